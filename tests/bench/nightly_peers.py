"""What one would do without conjoin, on the rows of nightly.py: all of them embedded again, or changes merged by id.

Assumes: called by nightly.py; each contender runs alone and has its table to itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_WRITTEN = 100_000
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Contender:
    """seconds of all it does; written_mb: that its table grew by."""

    name: str
    seconds: float
    rows: int
    written_mb: float


def size_of(folder: Path) -> float:
    """MB below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def full_reembed(source: Path, encoder: Path, folder: Path) -> Contender:
    """A plain loop: read, embed every text longest first, write a Lance table, build an index like conjoin's."""
    import lance

    import conjoin as cj
    from conjoin.pipeline.index import KIND, num_partitions

    started = time.monotonic()
    table = pq.read_table(source)
    texts = table["caption"].to_pylist()
    model = cj.load(str(encoder))
    order = np.argsort([-len(text) for text in texts], kind="stable")
    vectors: np.ndarray | None = None
    for start in range(0, len(texts), _BATCH):
        some = order[start : start + _BATCH]
        found = np.asarray(model.encode(text=[texts[n] for n in some]))
        vectors = np.empty((len(texts), found.shape[1]), np.float32) if vectors is None else vectors
        vectors[some] = found
    assert vectors is not None
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    where = folder / "again.lance"
    dataset = lance.write_dataset(table.append_column("text_vec", column), str(where))
    dataset.create_index("text_vec", KIND, metric="cosine", num_partitions=num_partitions(len(texts)))
    return Contender("a plain loop over all rows", time.monotonic() - started, len(texts), size_of(where))


def merge_inserts(rows: int, dim: int, shares: Sequence[float], folder: Path) -> Iterator[Contender]:
    """LanceDB's upsert of shares of the rows, vectors at hand, by an indexed id; no vector index is kept up."""
    import lancedb

    rng, where = np.random.default_rng(0), folder / "upsert"

    def made(ids: np.ndarray) -> pa.Table:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.random(len(ids) * dim, np.float32)), dim)
        names = [f"record-{n:09d}" for n in ids]
        return pa.table({"id": names, "caption": names, "price": rng.random(len(ids)), "text_vec": vectors})

    table = lancedb.connect(str(where)).create_table("bench", made(np.arange(min(rows, _WRITTEN))))
    for start in range(_WRITTEN, rows, _WRITTEN):
        table.add(made(np.arange(start, min(start + _WRITTEN, rows))))
    table.create_scalar_index("id")
    for share in shares:
        some = made(np.sort(rng.choice(rows, max(1, round(rows * share)), replace=False)))
        before = size_of(where)
        seconds, indexed = _timed(lambda some=some: _merge(table, some))
        name = f"merge_insert of {share:.1%}{'' if indexed else ', id without an index'}"
        yield Contender(name, seconds, some.num_rows, size_of(where) - before)


def _merge(table: object, some: pa.Table) -> bool:
    """Whether the index on the id served; where it fails (it may not spill) the join does without."""
    merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()  # type: ignore[attr-defined]
    try:
        merge.execute(some)
    except RuntimeError:
        merge.use_index(False).execute(some)
        return False
    return True


def _timed(action: Callable[[], bool]) -> tuple[float, bool]:
    started = time.monotonic()
    found = action()
    return time.monotonic() - started, found
