"""What nights cost after the first:
python tests/bench/nightly.py TEXTS.parquet [--rows 1000000] [--files 100] [--json].

TEXTS has a column `caption`; it is repeated to the wanted number of records with ids of their own, in files of equal
size, and embedded by a small text tower, so that planning and writing are what is measured. Each night is the command
`conjoin run` in processes of its own; the next builds on what it left. Printed: seconds, the share of the first
night, rows embedded, bytes and files written below the table and its bookkeeping, and the largest process. The same
changes are then merged by LanceDB's merge_insert into a table of the same rows, vectors at hand, which embeds and
plans nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from embed_memory import MARK, Peak, sample

ROOT = Path(__file__).parents[2]
DIM = 256
PROGRAM = [sys.executable, "-c", "from conjoin.jobs.cli import main; main()"]
LIMIT_MB = 3 * 1024


@dataclass(frozen=True, slots=True)
class Night:
    """seconds: wall, Ray included; steps: of the report; peak_mb: the largest process; written: bytes and files."""

    name: str
    seconds: float
    embedded: int
    written_mb: float
    written_files: int
    peak_mb: float
    steps: dict[str, float]


class Catalog:
    """The source as arrays; files are written whole, under a new name when `renamed`."""

    def __init__(self, folder: Path, texts: list[str], rows: int, files: int) -> None:
        self.folder, self.files = folder, files
        self.rng = np.random.default_rng(0)
        self.text = np.array(texts, object)[self.rng.integers(0, len(texts), rows)]
        self.price = self.rng.random(rows).round(2)
        self.generation = np.zeros(files, int)
        self.bounds = np.linspace(0, rows, files + 1).astype(int)
        (folder / "source").mkdir()
        self.write(range(files))

    def write(self, numbers: range | list[int], *, renamed: bool = False) -> None:
        for number in numbers:
            old = self.path(number)
            self.generation[number] += renamed
            start, stop = self.bounds[number], self.bounds[number + 1]
            table = pa.table(
                {
                    "id": [f"record-{n:09d}" for n in range(start, stop)],
                    "caption": pa.array(self.text[start:stop], pa.string()),
                    "price": self.price[start:stop],
                }
            )
            beside = old.with_suffix(".new")
            pq.write_table(table, beside, row_group_size=10_000)
            old.unlink(missing_ok=True)
            beside.rename(self.path(number))

    def path(self, number: int) -> Path:
        return self.folder / "source" / f"{number:05d}-{self.generation[number]}.parquet"

    def change(self, share: float, *, concentrated: bool = False) -> np.ndarray:
        """New texts for a share of all rows, spread over all files or inside 1 % of them; returns the rows."""
        rows = len(self.text)
        last = self.bounds[max(1, self.files // 100)] if concentrated else rows
        wanted = min(max(1, round(share * rows)), last)
        chosen = np.sort(self.rng.choice(last, wanted, replace=False))
        for row in chosen:
            self.text[row] = f"{self.text[row]} {self.rng.integers(1_000_000)}"
        self.write(sorted({int(n) for n in np.searchsorted(self.bounds, chosen, side="right") - 1}))
        return chosen


def encoder(folder: Path, texts: list[str], width: int) -> Path:
    from conjoin.encoders.checkpoint import save
    from conjoin.encoders.joint import build
    from conjoin.encoders.options import TowerOptions

    save(build({"text": TowerOptions(max_tokens=16, width=width)}, DIM, texts[:2000]), folder / f"encoder-{width}", {})
    return folder / f"encoder-{width}"


def run_file(folder: Path, tower: Path) -> Path:
    split = {"validation": 0, "test": 0}
    source = {"path": str(folder / "source"), "id": "id", "text": "caption", "keep": ["price"], "split": split}
    table = {"path": str(folder / "bench.lance")}
    path = folder / "conjoin.yaml"
    path.write_text(json.dumps({"name": "bench", "source": source, "encoder": str(tower), "table": table}))
    return path


def sizes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.glob("bench*/**/*") if path.is_file()}


def night(name: str, folder: Path, tower: Path) -> Night:
    """One `conjoin run`, watched."""
    mark, before, peaks = uuid.uuid4().hex, sizes(folder), defaultdict(Peak)
    started = time.monotonic()
    with (folder / "report.json").open("w") as report:
        process = subprocess.Popen(
            [*PROGRAM, "run", str(run_file(folder, tower)), "--json"],
            stdout=report,
            stderr=subprocess.DEVNULL,
            env={**os.environ, MARK: mark, "PYTHONPATH": str(ROOT)},
        )
        while process.poll() is None:
            sample(mark.encode(), process.pid, peaks)
            time.sleep(0.3)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{name}: exit {process.returncode}")
    found = json.loads((folder / "report.json").read_text())
    after = sizes(folder)
    new = {path: size for path, size in after.items() if before.get(path) != size}
    counts = found.get("counts", {}) if found["status"] == "published" else {}
    embedded = sum(counts.get(kind, 0) for kind in ("new", "changed", "again"))
    peak = max((p.resident for p in peaks.values()), default=0.0)
    steps = {step: value for step, value in found.get("seconds", {}).items() if value >= 0.1}
    result = Night(name, seconds, embedded, sum(new.values()) / 1e6, len(new), peak, steps)
    say(f"{name:<34} {seconds:7.1f} s  {steps}")
    return result


def merge_insert(folder: Path, rows: int, changed: list[tuple[str, int]]) -> list[tuple[str, float, float]]:
    """(changes, seconds, MB written) of LanceDB's upsert of as many rows, by id with a scalar index."""
    import lancedb

    rng, found = np.random.default_rng(0), []
    where = folder / "upsert"

    def made(ids: np.ndarray) -> pa.Table:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.random(len(ids) * DIM, np.float32)), DIM)
        names = [f"record-{n:09d}" for n in ids]
        return pa.table({"id": names, "caption": names, "price": rng.random(len(ids)), "text_vec": vectors})

    table = lancedb.connect(str(where)).create_table("bench", made(np.arange(min(rows, 100_000))))
    for start in range(100_000, rows, 100_000):
        table.add(made(np.arange(start, min(start + 100_000, rows))))
    for name, count in changed:
        some = made(np.sort(rng.choice(rows, count, replace=False)))
        before = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
        started = time.monotonic()
        table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(some)
        seconds = time.monotonic() - started
        after = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
        found.append((name, seconds, (after - before) / 1e6))
        say(f"merge_insert {name:<21} {seconds:7.1f} s")
    return found


def nights(given: argparse.Namespace, folder: Path) -> list[Night]:
    texts = [text for text in pq.read_table(given.texts, columns=["caption"])["caption"].to_pylist() if text]
    catalog = Catalog(folder, texts, given.rows, given.files)
    towers = [encoder(folder, texts, width) for width in (64, 96)]

    def prices() -> None:
        catalog.price = catalog.rng.random(given.rows).round(2)
        catalog.write(range(given.files))

    def rewritten() -> None:
        catalog.change(0.001)
        catalog.write(range(given.files), renamed=True)

    steps: list[tuple[str, Callable[[], object]]] = [
        ("first night", lambda: None),
        ("nothing changed", lambda: None),
        ("0.1 % changed, in 1 % of files", lambda: catalog.change(0.001, concentrated=True)),
        ("0.1 % changed, spread", lambda: catalog.change(0.001)),
        ("all files rewritten, 0.1 % changed", rewritten),
        ("1 % changed, spread", lambda: catalog.change(0.01)),
        ("10 % changed, spread", lambda: catalog.change(0.1)),
        ("all prices", prices),
    ]
    found = []
    for name, change in steps:
        change()
        found.append(night(name, folder, towers[0]))
    return [*found, night("a new encoder", folder, towers[1])]


def lines(found: list[Night], merged: list[tuple[str, float, float]]) -> list[str]:
    first = found[0].seconds
    targets = {
        "nothing changed": 10.0,
        "0.1 % changed, in 1 % of files": 25 + 0.03 * first,
        "0.1 % changed, spread": 25 + 0.15 * first,
        "all files rewritten, 0.1 % changed": 25 + 0.15 * first,
    }
    out = [
        f"{'night':<36} {'seconds':>8} {'of first':>8} {'embedded':>10} {'MB':>8} {'files':>6} {'peak MB':>8}  target"
    ]
    for one in found:
        goal = targets.get(one.name)
        met = "" if goal is None else f"{goal:.0f} s {'met' if one.seconds <= goal else 'MISSED'}"
        memory = "" if one.peak_mb <= LIMIT_MB else "  ABOVE 3 GiB"
        out.append(
            f"{one.name:<36} {one.seconds:>8.1f} {one.seconds / first:>8.2f} {one.embedded:>10,} "
            f"{one.written_mb:>8,.1f} {one.written_files:>6} {one.peak_mb:>8,.0f}  {met}{memory}"
        )
    out += [f"merge_insert, {name:<22} {seconds:>8.1f} {'':>8} {'':>10} {mb:>8,.1f}" for name, seconds, mb in merged]
    return out


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", help="a Parquet file with a column `caption`")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--no-peer", action="store_true", help="without merge_insert")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="nightly-") as folder:
        found = nights(given, Path(folder))
        shares = [("0.1 %", given.rows // 1000), ("1 %", given.rows // 100), ("10 %", given.rows // 10)]
        merged = [] if given.no_peer else merge_insert(Path(folder), given.rows, shares)
    print(
        json.dumps({"nights": [asdict(n) for n in found], "merge_insert": merged})
        if given.json
        else "\n".join(lines(found, merged))
    )


if __name__ == "__main__":
    main()
