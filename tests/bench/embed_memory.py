"""Memory and speed of a night: python tests/bench/embed_memory.py DATA ENCODER [--rows N] [--out FOLDER].

Runs `conjoin init` and `conjoin run` on a Parquet file and looks at every process of the run once a second. Prints, by
program, how many there were, the largest resident set of one (shared: object store and files), and rows per second.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK = "CONJOIN_BENCH_RUN"
LIMIT_MB = 3 * 1024


@dataclass(slots=True)
class Peak:
    """Of all processes with one name, in MB."""

    resident: float = 0
    private: float = 0
    pids: set[int] = field(default_factory=set)


def command_name(folder: Path) -> str:
    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    if words[0].startswith("ray::"):
        return re.sub(r"\.\w+$", "", words[0].strip())
    named = [Path(word).name for word in words if word.endswith(".py") or Path(word).name == "conjoin"]
    return named[0] if named else Path(words[0]).name or "?"


def sample(mark: bytes, driver: int, peaks: dict[str, Peak]) -> float:
    """One look at every process whose environment bears the mark; MB of all together, shared pages counted once."""
    together = 0.0
    for folder in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            if not folder.name.isdigit() or mark not in (folder / "environ").read_bytes():
                continue
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            resident, private = (int(status[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon"))
            peak = peaks["driver" if int(folder.name) == driver else command_name(folder)]
            peak.pids.add(int(folder.name))
            peak.resident, peak.private = max(peak.resident, resident), max(peak.private, private)
            rollup = (folder / "smaps_rollup").read_text().splitlines()[1:]
            together += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) / 1024
    return together


def first_rows(data: str, rows: int, out: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(data) as file, pq.ParquetWriter(out, file.schema_arrow) as writer:
        left = rows
        for batch in file.iter_batches(4_000):
            writer.write_table(pa.Table.from_batches([batch.slice(0, left)]))
            left -= len(batch)
            if left <= 0:
                break
    return str(out)


def night(data: str, encoder: str, out: Path) -> tuple[dict[str, object], dict[str, Peak], float]:
    """The run's report, the peaks by name, wall seconds."""
    run_file, mark = out / "conjoin.yaml", uuid.uuid4().hex
    program = [sys.executable, "-c", "from conjoin.jobs.cli import main; main()"]
    subprocess.run([*program, "init", data, "--out", str(run_file), "--force"], check=True, stdout=subprocess.DEVNULL)
    settings = {"encoder": encoder, "table.path": str(out / "vectors" / "bench.lance")}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    peaks: dict[str, Peak] = defaultdict(Peak)
    started = time.monotonic()
    with (out / "report.json").open("w") as report:
        process = subprocess.Popen(
            [*program, "run", str(run_file), *words, "--json"], stdout=report, env={**os.environ, MARK: mark}
        )
        while process.poll() is None:
            sample(mark.encode(), process.pid, peaks)
            time.sleep(1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads((out / "report.json").read_text()), peaks, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a Parquet file")
    parser.add_argument("encoder", help="a trained encoder's folder")
    parser.add_argument("--rows", type=int, help="only the first rows")
    parser.add_argument("--out", type=Path, help="a new folder for the table; default: a temporary one")
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="embed-memory-"))
    out.mkdir(parents=True, exist_ok=True)
    data = first_rows(given.data, given.rows, out / "rows.parquet") if given.rows else str(Path(given.data).absolute())
    report, peaks, seconds = night(data, str(Path(given.encoder).absolute()), out)
    print(f"{'process':<44} {'count':>5} {'peak MB':>8} {'private':>8}")
    for name, peak in sorted(peaks.items(), key=lambda item: -item[1].resident):
        too_much = "  ABOVE 3 GiB" if peak.resident > LIMIT_MB else ""
        print(f"{name[:44]:<44} {len(peak.pids):>5} {peak.resident:>8,.0f} {peak.private:>8,.0f}{too_much}")
    steps = report["seconds"]
    assert isinstance(steps, dict)
    rows = int(str(report["rows"]))
    print(f"{rows:,} rows, this attempt {seconds:,.0f} s; all units of all attempts: {report['rows_per_s']} rows/s")
    print("  ".join(f"{step} {value:,.1f} s" for step, value in steps.items()))


if __name__ == "__main__":
    main()
