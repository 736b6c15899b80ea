"""Wall time of a cold `conjoin query` with a filter and no text(), against a bare lancedb script doing the same.

    python tests/bench/cold_query.py [--rows 100000] [--repeats 7] [--imports]

Both start a fresh Python, open the table, take the rows of a filter and print them. The two take turns; the fastest
and the median of each are printed. `--imports` lists what ours spends on imports (python -X importtime).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

DIM = 128
FACTS = {"fingerprint": "f" * 32, "modality": "image", "metric": "cosine", "dim": str(DIM), "encoder": ""}
PEER = """
import sys, lancedb
table = lancedb.connect(sys.argv[1]).open_table("things")
table.checkout("live")
for row in table.search().where("stock < 5").select(["id", "price"]).to_list():
    print(row["id"], row["price"])
"""
OURS = "import sys; sys.argv[0] = 'conjoin'; from conjoin.jobs.cli import main; main()"
SQL = "SELECT id, price FROM things WHERE stock < 5"


def write(folder: str, num_rows: int) -> str:
    rng = np.random.default_rng(0)
    values = pa.array(rng.normal(size=num_rows * DIM).astype(np.float32))
    vectors = pa.FixedSizeListArray.from_arrays(values, DIM)
    metadata = {f"conjoin:{name}": value for name, value in FACTS.items()}
    rows = {"id": [f"r{i}" for i in range(num_rows)], "price": rng.random(num_rows), "stock": list(range(num_rows))}
    fields = [("id", pa.string()), ("price", pa.float64()), ("stock", pa.int64())]
    schema = pa.schema([*fields, pa.field("image_vec", vectors.type, metadata=metadata)])
    dataset = lance.write_dataset(pa.table({**rows, "image_vec": vectors}, schema=schema), f"{folder}/things.lance")
    dataset.tags.create("live", 1)
    return f"{folder}/things.lance"


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    taken = time.perf_counter() - start
    assert "r4" in done.stdout
    return taken


def slowest_imports(command: list[str], num_shown: int = 25) -> list[str]:
    """The modules with the most time of their own and of what they import, in ms."""
    done = subprocess.run([command[0], "-X", "importtime", *command[1:]], capture_output=True, text=True, check=True)
    found = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)", done.stderr)
    rows = sorted(((int(total), int(own), name) for own, total, _, name in found), reverse=True)
    return [
        f"{total / 1000:8.1f} ms with its imports, {own / 1000:7.1f} ms alone  {name}" for total, own, name in rows
    ][:num_shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--imports", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = write(folder, options.rows)
        config = Path(folder, "conjoin.yaml")
        config.write_text(f"name: things\nsource: {{path: x, id: id, image: image}}\ntable: {{path: {uri}}}\n")
        commands = {
            "lancedb": [sys.executable, "-c", PEER, folder],
            "conjoin query things.lance": [sys.executable, "-c", OURS, "query", uri, SQL, "--csv"],
            "conjoin query conjoin.yaml": [sys.executable, "-c", OURS, "query", str(config), SQL, "--csv"],
        }
        if options.imports:
            print("\n".join(slowest_imports(commands["conjoin query things.lance"])))
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, command in commands.items():
                taken[name].append(seconds(command))
    peer = statistics.median(taken["lancedb"])
    for name, times in taken.items():
        median = statistics.median(times)
        print(f"{name:<28} fastest {min(times):.2f} s, median {median:.2f} s, {median / peer:.2f} x lancedb")


if __name__ == "__main__":
    main()
