"""Which index, and from how many rows on: python tests/bench/index_kinds.py DIR, a folder of tests/bench/query.py.

kinds: IVF_SQ, IVF_FLAT and IVF_PQ over the same rows: seconds to build, MB, and recall@10 and ms of one query by probes
and refinement. exact: ms of one exact search by number of rows, which decides from where on an index is worth it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import lance
import numpy as np
from query_data import Data, K, load
from query_ours import rows

from conjoin.pipeline.index import num_partitions

KINDS: dict[str, dict[str, int]] = {"IVF_SQ": {}, "IVF_FLAT": {}, "IVF_PQ": {"num_sub_vectors": 64}}
SETTINGS = ((8, 2), (16, 2), (32, 2), (16, 4), (32, 4))  # nprobes, refine
EXACT_ROWS = (10_000, 20_000, 50_000, 100_000)


def ask(dataset: lance.LanceDataset, data: Data, **how: object) -> tuple[float, float]:
    """Recall@10 after exact ranking of the candidates, and the median ms."""
    found, times = [], []
    for query in data.single:
        start = time.perf_counter()
        near = {"column": "image_vec", "q": query, "metric": "cosine", "k": K, **how}
        ids = dataset.to_table(columns=["id", "image_vec", "_distance"], nearest=near)["id"].to_numpy()
        times.append(time.perf_counter() - start)
        found.append(ids[np.argsort(-(data.vectors[ids] @ query), kind="stable")][:K].tolist())
    return data.recall(data.single, found), float(np.median(times) * 1000)


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="DIR/rows-100000")
    data = load(parser.parse_args().folder)
    table = rows(data)
    with tempfile.TemporaryDirectory() as place:
        for kind, more in KINDS.items():
            dataset = lance.write_dataset(table, f"{place}/{kind}", data_storage_version="2.2")
            start = time.perf_counter()
            dataset.create_index("image_vec", kind, metric="cosine", num_partitions=num_partitions(len(table)), **more)
            size = megabytes(Path(place, kind, "_indices"))
            print(f"{kind}: build {time.perf_counter() - start:.0f} s, {size:.0f} MB")
            for probes, refine in SETTINGS:
                recall, ms = ask(dataset, data, minimum_nprobes=probes, maximum_nprobes=probes, k=K * refine)
                print(f"  {probes} probes, refine {refine}: recall@10 {recall:.4f} at {ms:.1f} ms")
        for count in EXACT_ROWS:
            part = lance.write_dataset(table.slice(0, count), f"{place}/{count}", data_storage_version="2.2")
            print(f"exact, {count:,} rows: {ask(part, data, use_index=False)[1]:.0f} ms")


if __name__ == "__main__":
    main()
