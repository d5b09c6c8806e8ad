# What a newcomer runs. PYTHON chooses the interpreter of the virtual environment, 3.10 or newer.
PYTHON ?= python3
VENV := .venv
DEMO := configs/demo/fcn_r18-tiny_1xb8
BIN := $(VENV)/bin
# Small models on few cores: more threads than cores only get in each other's way.
export OMP_NUM_THREADS ?= 2

.PHONY: help setup demo demo-data test test-slow lint clean
.DEFAULT_GOAL := help

help:
	@echo "make setup      virtual environment in $(VENV) with the package and its extras"
	@echo "make demo       train a small segmentor without and with InfoBatch, and compare"
	@echo "make demo-data  draw the demo's data set into data/demo"
	@echo "make test       default test suite;  make test-slow: the long tests"
	@echo "make lint       ruff and mypy"

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mm,report,test,dev]'
	touch $@

data/demo/.drawn: $(VENV)/.installed infobatch_mm/demo/street.py
	$(BIN)/python -m infobatch_mm.demo.street data/demo
	touch $@

demo-data: data/demo/.drawn

demo: demo-data
	$(BIN)/python tools/compare.py $(DEMO)-1k_demo-96x96.py $(DEMO)-infobatch-1k_demo-96x96.py --work-dir work_dirs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) work_dirs data/demo
