"""What measures, index and gates of a night cost at volume: `python tests/bench/upkeep.py --rows 1000000 --dim 128`.

Two vector columns of made vectors with neighbourhoods. First night: exact answers by one pass, indexes built; then
nights of 0.1 % of the rows, gone from all fragments and as many new. Prints a line of JSON per step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from lance.fragment import write_fragments

from conjoin.pipeline import index, measures, store
from conjoin.pipeline.gates import Expected, Gates, check_gates, check_indexed
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.store import TableConfig

FINGERPRINT = "0" * 32
COLUMNS = ("image", "text")


def schema(dim: int) -> pa.Schema:
    fields = [pa.field("id", pa.int64())]
    for modality in COLUMNS:
        facts = {"fingerprint": FINGERPRINT, "modality": modality, "metric": "cosine", "dim": str(dim), "encoder": ""}
        metadata = {f"conjoin:{key}": value for key, value in facts.items()}
        fields.append(pa.field(f"{modality}_hash", pa.binary(16)))
        fields.append(pa.field(f"{modality}_vec", pa.list_(pa.float32(), dim), metadata=metadata))
    return pa.schema(fields)


def rows(first: int, count: int, dim: int, centres: np.ndarray) -> pa.Table:
    """Text vectors lie near those of their pictures."""
    rng = np.random.default_rng(first)
    images = centres[rng.integers(len(centres), size=count)] + 0.6 * rng.normal(size=(count, dim)).astype(np.float32)
    columns: list[pa.Array] = [pa.array(range(first, first + count), pa.int64())]
    for noise in (0.0, 0.3):
        vectors = images + noise * rng.normal(size=images.shape).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        columns.append(pa.array([i.to_bytes(16, "big") for i in range(first, first + count)], pa.binary(16)))
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel().astype(np.float32)), dim))
    return pa.table(columns, schema=schema(dim))


def commit(uri: str, run: str, operation: Any) -> Any:
    head = store.head(uri)
    version = 0 if head is None else head.version
    transaction = lance.Transaction(version, operation, transaction_properties={"run_id": run})
    return lance.LanceDataset.commit(uri, transaction, enable_stable_row_ids=False)


@contextmanager
def timed(step: str) -> Iterator[dict[str, object]]:
    facts: dict[str, object] = {}
    start = time.perf_counter()
    yield facts
    print(json.dumps({"step": step, "seconds": round(time.perf_counter() - start, 2), **facts}), flush=True)


def first(uri: str, num_rows: int, make: Callable[[int, int], pa.Table]) -> None:
    shutil.rmtree(uri, ignore_errors=True)
    shutil.rmtree(store.bookkeeping(uri), ignore_errors=True)
    staged: list[Any] = []
    for start in range(0, num_rows, 50_000):
        table = make(start, min(50_000, num_rows - start))
        mode = "append" if staged else "create"
        staged += write_fragments(table, uri, schema=table.schema, mode=mode, data_storage_version="2.2")
    commit(uri, "r1", lance.LanceOperation.Overwrite(table.schema, staged))


def night(uri: str, run: str, changed: int, new: pa.Table, number: int) -> None:
    """`changed` rows gone, spread over all fragments, and `new` in a fragment of their own."""
    head = lance.dataset(uri)
    fragments = [fragment for fragment in head.get_fragments() if fragment.physical_rows >= 50_000]
    each = changed // len(fragments)
    gone = [fragment.delete_rows(list(range(number * each, number * each + each))) for fragment in fragments]
    staged = write_fragments(new, uri, mode="append")
    commit(uri, run, lance.LanceOperation.Update(updated_fragments=gone, new_fragments=staged))


def publish(uri: str) -> None:
    head = lance.dataset(uri)
    (head.tags.update if "live" in head.tags.list() else head.tags.create)("live", head.version)


def main() -> None:
    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.embed import EmbedConfig

    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--nights", type=int, default=2)
    parser.add_argument("--path", default="/tmp/conjoin-upkeep/table.lance")
    options = parser.parse_args()
    uri, dim = options.path, options.dim
    Path(uri).parent.mkdir(parents=True, exist_ok=True)
    centres = np.random.default_rng(0).normal(size=(max(options.rows // 100, 4), dim)).astype(np.float32)
    config = TableConfig(path=uri)
    catalog = Catalog("upkeep", SourceConfig(path=uri, id="id", text="text"), "", config, EmbedConfig())
    with timed("write"):
        first(uri, options.rows, lambda start, count: rows(start, count, dim, centres))
    with timed("measures of the first night"):
        measures.measure(lance.dataset(uri))
    with timed("indexes of the first night") as facts:
        facts["indexes"] = [(r.column, r.recall, r.nprobes, r.latency_ms) for r in index.build(uri, config)]
    publish(uri)
    changed = options.rows // 1000
    for number in range(options.nights):
        live = store.open_version(uri)
        night(uri, f"r{number + 2}", changed, rows(options.rows + number * changed, changed, dim, centres), number)
        head = lance.dataset(uri)
        left = head.count_rows()
        expected = Expected(left, FINGERPRINT, tuple(f"{name}_vec" for name in COLUMNS))
        with timed("measures"):
            measures.measure(head, live)
        with timed("gates of the candidate") as facts:
            results = check_gates(head, expected, Gates(), live, catalog)
            facts["gates"] = len(results)
        with timed("indexes") as facts:
            reports = index.build(uri, config)
            facts["indexes"] = [(r.column, r.action, r.parts, r.recall, r.latency_ms, r.seconds) for r in reports]
        with timed("gates of the head"):
            check_indexed(lance.dataset(uri), expected, Gates(), catalog, live, results)
        publish(uri)


if __name__ == "__main__":
    main()
