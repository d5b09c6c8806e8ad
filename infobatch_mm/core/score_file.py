"""The scores that a run leaves behind: one line for each sample, written a chunk at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .store import ScoreStore

#: Where the scores are: in Parquet where pyarrow is installed, else in numpy's own format.
SCORES_FILES = ("infobatch_scores.parquet", "infobatch_scores.npz")
COLUMNS = ("index", "score", "times_seen", "name")

_CHUNK = 2**16


def write_scores(work_dir: str, store: ScoreStore, names: Sequence[str] | Iterable[Sequence[str]] | None = None) -> str:
    """Write ``index, score, times_seen, name`` of every sample: int64, float32, int32, text.

    Into ``infobatch_scores.parquet`` where pyarrow is installed, else into ``infobatch_scores.npz``. An earlier file of
    the other kind is removed, so that nobody reads old scores.

    Args:
        work_dir (str): Where to.
        store (ScoreStore): What to write; NaN stands for samples without a score.
        names (Sequence[str] | Iterable[Sequence[str]], optional): Names of the samples in their order, or chunks of
            them, of any size, for data sets whose names are not to be held together. Defaults to None: '' for each.

    Returns:
        str: The file.

    Raises:
        ValueError: If there are not as many names as samples.
    """
    store.flush()
    columns = _columns(store, names)
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        parquet = None
    path, other = (Path(work_dir, name) for name in (SCORES_FILES if parquet else SCORES_FILES[::-1]))
    partial = path.with_name(f"infobatch_scores.tmp{path.suffix}")
    if parquet is None:
        parts = list(columns)
        np.savez_compressed(partial, **{name: np.concatenate([each[name] for each in parts]) for name in COLUMNS})
    else:
        _write_parquet(parquet, partial, columns)
    os.replace(partial, path)
    other.unlink(missing_ok=True)
    return str(path)


def read_scores(work_dir: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """What :func:`write_scores` wrote there: the four columns by name, shape ``(N,)`` each.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If it is in Parquet and pyarrow is not installed.
    """
    parquet, plain = (Path(work_dir, name) for name in SCORES_FILES)
    if not parquet.is_file():
        with np.load(plain) as found:
            return {name: found[name] for name in COLUMNS}
    from pyarrow.parquet import read_table

    table = read_table(parquet)
    return {name: np.asarray(table.column(name).to_numpy(), dtype=None if name != "name" else str) for name in COLUMNS}


def _columns(store: ScoreStore, names: Any) -> Iterator[dict[str, np.ndarray]]:
    """Chunks of the columns."""
    length = store.num_samples
    chunks: Iterable[Sequence[str]]
    if names is None:
        chunks = ([""] * (min(length, start + _CHUNK) - start) for start in range(0, length, _CHUNK))
    elif isinstance(names, Sequence) and (not names or isinstance(names[0], str)):
        chunks = (names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK))
    else:
        chunks = names
    start = 0
    values, seen, times = store.values.numpy(), store.seen.numpy(), store.times_seen.numpy()
    for chunk in chunks:
        part = slice(start, start + len(chunk))
        start += len(chunk)
        if start > length:
            break
        yield {
            "index": np.arange(part.start, part.stop, dtype=np.int64),
            "score": np.where(seen[part], values[part], np.float32(np.nan)),
            "times_seen": times[part].copy(),
            "name": np.asarray(chunk, dtype=str),
        }
    if start != length:
        raise ValueError(f"{start} or more names for {length} samples: give one for each, in their order")


def _write_parquet(parquet: Any, path: Path, columns: Iterator[dict[str, np.ndarray]]) -> None:
    import pyarrow as pa

    kinds = (pa.int64(), pa.float32(), pa.int32(), pa.string())
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
    with parquet.ParquetWriter(path, schema) as writer:
        for chunk in columns:
            arrays = [
                pa.array(chunk[name].tolist() if name == "name" else chunk[name], kind)
                for name, kind in zip(COLUMNS, kinds, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
