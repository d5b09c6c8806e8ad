# What a newcomer runs. PYTHON chooses the interpreter of the virtual environment, 3.10 or newer.
PYTHON ?= python3
VENV := .venv
OPS := .venv-ops
DEMO := configs/demo/fcn_r18-tiny_1xb8
DEMO_CLS := configs/resnet/resnet18-tiny_1xb32
DEMO_MAE := configs/mae/mae_vit-tiny-p8_1xb64-coslr
DEMO_LDM := configs/ldm/ldm_unet-tiny-vq-f2_1xb16
BIN := $(VENV)/bin
# Small models on few cores: more threads than cores only get in each other's way.
export OMP_NUM_THREADS ?= 2

.PHONY: help setup ops demo demo-data demo-cls demo-mae demo-ldm demo-shapes test test-slow test-ops faults lint zoo zoo-cls zoo-mae clean
.DEFAULT_GOAL := help

help:
	@echo "make setup      virtual environment in $(VENV) with the package and its extras"
	@echo "make demo       train a small segmentor without and with InfoBatch, and compare"
	@echo "make demo-data  draw the demo's data set into data/demo"
	@echo "make demo-cls   the same with a small classifier, on what make demo-shapes draws into data/demo-shapes"
	@echo "make demo-mae   pre-train a small masked autoencoder, and fine-tune from it, about a quarter of an hour"
	@echo "make demo-ldm   train a first stage and a small latent-diffusion model without and with InfoBatch, about six minutes"
	@echo "make test       default test suite;  make test-slow: the long tests"
	@echo "make faults     kill trainings and resume them, about five minutes"
	@echo "make lint       ruff and mypy"
	@echo "make zoo        weigh every method folder of MMSegmentation, about a quarter of an hour; make zoo-cls: the"
	@echo "                classifiers of MMPretrain, make zoo-mae: its self-supervised models, as long"
	@echo "make ops        a second environment in $(OPS), with mmcv's operators compiled for the CPU and MMDetection;"
	@echo "                make test-ops: the tests that need them"

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mm,diffusers,report,test,dev]'
	touch $@

# mmcv is compiled against the torch it runs with; its sources are C++17, which torch 2.15 refuses. Without
# --no-cache-dir pip takes the wheel without operators that another environment has left in its cache; === keeps it from a torch
# whose build is not torchvision's.
ops: $(OPS)/.installed

$(OPS)/.installed: setup.py
	test -x $(OPS)/bin/python || $(PYTHON) -m venv $(OPS)
	$(OPS)/bin/python -m pip install --quiet --disable-pip-version-check 'torch===2.13.0' 'torchvision===0.28.0' setuptools wheel ninja psutil
	MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=2 $(OPS)/bin/python -m pip install --disable-pip-version-check --no-cache-dir --no-build-isolation --no-binary onedl-mmcv onedl-mmcv
	$(OPS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[mm,det,report,test]'
	$(OPS)/bin/python -c 'import mmcv._ext, mmdet.models'
	touch $@

data/demo/.drawn: $(VENV)/.installed infobatch_mm/demo/street.py infobatch_mm/demo/photo.py
	$(BIN)/python -m infobatch_mm.demo.street data/demo
	touch $@

demo-data: data/demo/.drawn

demo: demo-data
	$(BIN)/python tools/compare.py $(DEMO)-1k_demo-96x96.py $(DEMO)-infobatch-1k_demo-96x96.py --work-dir work_dirs/demo

data/demo-shapes/.drawn: $(VENV)/.installed infobatch_mm/demo/shapes.py infobatch_mm/demo/photo.py
	$(BIN)/python -m infobatch_mm.demo.shapes data/demo-shapes
	touch $@

demo-shapes: data/demo-shapes/.drawn

demo-cls: demo-shapes
	$(BIN)/python tools/compare.py $(DEMO_CLS)-16e_demo-32px.py $(DEMO_CLS)-infobatch-16e_demo-32px.py --work-dir work_dirs/demo-cls

demo-mae: demo-data
	$(BIN)/python tools/compare.py $(DEMO_MAE)-100e_demo-64px.py $(DEMO_MAE)-infobatch-100e_demo-64px.py --then configs/mae/fcn_mae-vit-tiny-p8_1xb16-450_demo-64x64.py --work-dir work_dirs/demo-mae

work_dirs/demo-ldm/first_stage/config.json: data/demo-shapes/.drawn
	$(BIN)/python tools/train_autoencoder.py --train_data_dir data/demo-shapes/train --resolution 32 --downsample_factor 2 --block_out_channels 16 16 --num_epochs 6 --learning_rate 4e-3 --output_dir $(@D)

# One thread is about as fast as two on images so small, and does not wait for a core that is busy.
demo-ldm work_dirs/demo-ldm/first_stage/config.json: export OMP_NUM_THREADS := 1
demo-ldm: demo-shapes work_dirs/demo-ldm/first_stage/config.json
	$(BIN)/python tools/compare_ldm.py $(DEMO_LDM)-10e_demo-32px.yaml $(DEMO_LDM)-infobatch-10e_demo-32px.yaml --work_dir work_dirs/demo-ldm

# Two tests at a time, each with one thread.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

faults: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_engine/test_faults.py

test-ops: $(OPS)/.installed
	$(OPS)/bin/python -m pytest tests/test_losses

zoo: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/zoo.py --json work_dirs/zoo.json --markdown work_dirs/zoo.md

zoo-cls: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/zoo.py --host mmpretrain --json work_dirs/zoo-cls.json --markdown work_dirs/zoo-cls.md

zoo-mae: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/zoo.py --host mmpretrain_selfsup --json work_dirs/zoo-mae.json --markdown work_dirs/zoo-mae.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OPS) work_dirs data/demo data/demo-shapes
