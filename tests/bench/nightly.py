"""What nights cost after the first:
python tests/bench/nightly.py TEXTS.parquet [SCENE...] [--rows 1000000] [--files 100] [--s3] [--out DIR] [--json].

TEXTS has a column `caption`; it is repeated to the wanted number of records with ids of their own, in files of equal
size, and embedded by a small text tower, so that planning and writing are what is measured. Each night is the command
`conjoin run` in processes of its own; the next builds on what it left. Printed: seconds, the share of the first
night, rows embedded, bytes and files written below the table and its bookkeeping, the largest process and all of them
together, with --s3 requests by method. Contenders: `loop` embeds all rows again without conjoin and indexes them;
`merge` is LanceDB's merge_insert of the same changes by id, vectors at hand, which embeds, plans and indexes nothing.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from embed_memory import MARK, Peak, sample
from nightly_peers import Contender, full_reembed, merge_inserts

ROOT = Path(__file__).parents[2]
DIM = 256
PROGRAM = [sys.executable, "-c", "from conjoin.jobs.cli import main; main()"]
LIMIT_MB = 3 * 1024
SHARES = (0.001, 0.01, 0.1)
PEERS = ("loop", "merge")


@dataclass(frozen=True, slots=True)
class Night:
    """seconds: wall, Ray included; steps: of the report; written: bytes and files; largest_mb: of one process, all_mb:
    of all of them at one moment; requests: to S3 by method.
    """

    name: str
    seconds: float
    embedded: int
    written_mb: float
    written_files: int
    largest_mb: float
    all_mb: float
    steps: dict[str, float]
    requests: dict[str, int]


class Store:
    """Where source and table lie: a folder, or with `s3` a bucket of a moto server, whose log counts requests."""

    def __init__(self, folder: Path, *, s3: bool) -> None:
        self.folder, self.s3, self.log = folder, s3, folder / "s3.log"
        self.environment: dict[str, str] = {}
        if not s3:
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self.server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=self.log.open("w"))
        atexit.register(self.server.kill)
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        self.environment = dict.fromkeys(names, "bench") | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        os.environ.update(self.environment)
        while "Running on" not in self.log.read_text():
            time.sleep(0.2)
        self.files.mkdir("bench")

    @cached_property
    def files(self) -> Any:  # s3fs is untyped
        import s3fs

        return s3fs.S3FileSystem()

    def uri(self, name: str) -> str:
        return f"s3://bench/{name}" if self.s3 else str(self.folder / name)

    def upload(self, old: Path, new: Path) -> None:
        if self.s3:
            if old != new:
                self.files.rm(self.uri(f"source/{old.name}"))
            self.files.put(str(new), self.uri(f"source/{new.name}"))

    def sizes(self) -> dict[str, tuple[int, object]]:
        """(bytes, version) of every file below the table and its bookkeeping."""
        if self.s3:
            self.files.invalidate_cache()
            found = self.files.find("bench", detail=True)
            return {k: (v["size"], v["ETag"]) for k, v in found.items() if not k.startswith("bench/source/")}
        paths = [path for path in self.folder.glob("bench*/**/*") if path.is_file()]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}

    def requests(self) -> Counter[str]:
        if not self.s3:
            return Counter()
        return Counter(re.findall(r'"(?:\x1b\[\d+m)*(GET|PUT|HEAD|POST|DELETE) /', self.log.read_text()))


class Catalog:
    """The source as arrays; files are written whole, under a new name when `renamed`."""

    def __init__(self, folder: Path, texts: list[str], rows: int, files: int, store: Store) -> None:
        self.folder, self.files, self.store = folder, files, store
        self.rng = np.random.default_rng(0)
        self.text = np.array(texts, object)[self.rng.integers(0, len(texts), rows)]
        self.price = self.rng.random(rows).round(2)
        self.generation = np.zeros(files, int)
        self.bounds = np.linspace(0, rows, files + 1).astype(int)
        (folder / "source").mkdir()
        self.write(range(files))

    def reprice(self) -> None:
        self.price = self.rng.random(len(self.price)).round(2)
        self.write(range(self.files))

    def rewrite(self, share: float) -> None:
        self.change(share)
        self.write(range(self.files), renamed=True)

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
            self.store.upload(old, self.path(number))

    def path(self, number: int) -> Path:
        return self.folder / "source" / f"{number:05d}-{self.generation[number]}.parquet"

    def change(self, share: float, *, concentrated: bool = False) -> None:
        """New texts for a share of all rows, spread over all files or in 1 % of them (more if need be)."""
        rows = len(self.text)
        few = max(1, math.ceil(self.files * max(0.01, share)))
        last = self.bounds[few] if concentrated else rows
        wanted = min(max(1, round(share * rows)), last)
        chosen = np.sort(self.rng.choice(last, wanted, replace=False))
        for row in chosen:
            self.text[row] = f"{self.text[row]} {self.rng.integers(1_000_000)}"
        self.write(sorted({int(n) for n in np.searchsorted(self.bounds, chosen, side="right") - 1}))


def encoder(folder: Path, texts: list[str], width: int) -> Path:
    from conjoin.encoders.checkpoint import save
    from conjoin.encoders.joint import build
    from conjoin.encoders.options import TowerOptions

    save(build({"text": TowerOptions(max_tokens=16, width=width)}, DIM, texts[:2000]), folder / f"encoder-{width}", {})
    return folder / f"encoder-{width}"


def run_file(store: Store, tower: Path) -> Path:
    split = {"validation": 0, "test": 0}
    source = {"path": store.uri("source"), "id": "id", "text": "caption", "keep": ["price"], "split": split}
    table = {"path": store.uri("bench.lance")}
    path = store.folder / "conjoin.yaml"
    path.write_text(json.dumps({"name": "bench", "source": source, "encoder": str(tower), "table": table}))
    return path


SCENES: dict[str, tuple[str, Callable[[Catalog], object]]] = {
    "nothing": ("nothing changed", lambda _: None),
    "near": ("0.1 % changed, in 1 % of files", lambda catalog: catalog.change(0.001, concentrated=True)),
    "spread": ("0.1 % changed, spread", lambda catalog: catalog.change(0.001)),
    "rewritten": ("all files rewritten, 0.1 % changed", lambda catalog: catalog.rewrite(0.001)),
    "prices": ("all prices", lambda catalog: catalog.reprice()),
    "near1": ("1 % changed, in 1 % of files", lambda catalog: catalog.change(0.01, concentrated=True)),
    "spread1": ("1 % changed, spread", lambda catalog: catalog.change(0.01)),
    "near10": ("10 % changed, in 10 % of files", lambda catalog: catalog.change(0.1, concentrated=True)),
    "spread10": ("10 % changed, spread", lambda catalog: catalog.change(0.1)),
    "encoder": ("a new encoder", lambda _: None),
}


def night(name: str, store: Store, tower: Path) -> Night:
    """One `conjoin run`, watched."""
    mark, before, asked, peaks = uuid.uuid4().hex, store.sizes(), store.requests(), defaultdict(Peak)
    started, together = time.monotonic(), 0.0
    out = store.folder / "report.json"
    with out.open("w") as report:
        process = subprocess.Popen(
            [*PROGRAM, "run", str(run_file(store, tower)), "--json"],
            stdout=report,
            stderr=(store.folder / "stderr.log").open("a"),
            env={**os.environ, MARK: mark, "PYTHONPATH": str(ROOT)},
        )
        while process.poll() is None:
            together = max(together, sample(mark.encode(), process.pid, peaks))
            time.sleep(0.5)
    seconds, requests = time.monotonic() - started, store.requests() - asked
    if process.returncode:
        raise SystemExit(f"{name}: exit {process.returncode}\n{(store.folder / 'stderr.log').read_text()[-2000:]}")
    found, after = json.loads(out.read_text()), store.sizes()
    new = {path: size for path, size in after.items() if before.get(path) != size}
    counts = found.get("counts", {}) if found["status"] == "published" else {}
    result = Night(
        name=name,
        seconds=seconds,
        embedded=sum(counts.get(kind, 0) for kind in ("new", "changed", "again")),
        written_mb=sum(size for size, _ in new.values()) / 1e6,
        written_files=len(new),
        largest_mb=max((p.resident for p in peaks.values()), default=0.0),
        all_mb=together,
        steps={step: value for step, value in found.get("seconds", {}).items() if value >= 0.1},
        requests=dict(requests),
    )
    memory = f"{together:,.0f} MB of memory, {result.written_mb:,.1f} MB in {len(new)} files written"
    say(f"{name:<34} {seconds:7.1f} s  {result.embedded:>9,} embedded  {memory}  {result.steps}  {result.requests}")
    return result


def nights(given: argparse.Namespace, folder: Path) -> tuple[list[Night], list[Contender]]:
    """The first night, then the scenes that were asked for in the order of SCENES, then the contenders."""
    texts = [text for text in pq.read_table(given.texts, columns=["caption"])["caption"].to_pylist() if text]
    store = Store(folder, s3=given.s3)
    catalog = Catalog(folder, texts, given.rows, given.files, store)
    towers = [encoder(folder, texts, width) for width in (64, 96)]
    wanted = given.scenes or [*SCENES, *PEERS]
    found = [night("first night", store, towers[0])]
    for scene, (name, change) in SCENES.items():
        if scene in wanted:
            change(catalog)
            found.append(night(name, store, towers[scene == "encoder"]))
    merges = merge_inserts(given.rows, DIM, SHARES, folder) if "merge" in wanted else iter(())
    loops = (full_reembed(folder / "source", towers[0], folder) for _ in range("loop" in wanted))
    peers = []
    for peer in itertools.chain(merges, loops):
        say(f"{peer.name:<34} {peer.seconds:7.1f} s  {peer.written_mb:,.1f} MB written")
        peers.append(peer)
    return found, peers


def target_s(name: str, first: float) -> float | None:
    """What a night of 1,000,000 rows may take."""
    allowed = {
        "nothing changed": 10.0,
        "0.1 % changed, in 1 % of files": 25 + 0.03 * first,
        "0.1 % changed, spread": 25 + 0.15 * first,
        "all files rewritten, 0.1 % changed": 25 + 0.15 * first,
    }
    return allowed.get(name)


def lines(found: list[Night], peers: list[Contender]) -> list[str]:
    first = found[0].seconds
    titles = ("seconds", "of first", "embedded", "rows/s", "MB", "files", "largest", "all MB")
    out = [f"{'night':<36} " + " ".join(f"{title:>9}" for title in titles) + "  target"]
    for one in found:
        goal = target_s(one.name, first)
        met = "" if goal is None else f"{goal:.0f} s {'met' if one.seconds <= goal else 'MISSED'}"
        memory = "" if one.all_mb <= LIMIT_MB else "  ABOVE 3 GiB"
        asked = "  ".join(f"{count} {method}" for method, count in sorted(one.requests.items()))
        out.append(
            f"{one.name:<36} {one.seconds:>9.1f} {one.seconds / first:>9.2f} {one.embedded:>9,} "
            f"{one.embedded / one.seconds:>9,.0f} {one.written_mb:>9,.1f} {one.written_files:>9} "
            f"{one.largest_mb:>9,.0f} {one.all_mb:>9,.0f}  {met}{memory}  {asked}".rstrip()
        )
    for peer in peers:
        rate = peer.rows / peer.seconds
        out.append(
            f"{peer.name:<36} {peer.seconds:>9.1f} {peer.seconds / first:>9.2f} {peer.rows:>9,} {rate:>9,.0f} "
            f"{peer.written_mb:>9,.1f}"
        )
    return out


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", help="a Parquet file with a column `caption`")
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=", ".join([*SCENES, *PEERS]) + "; default: all")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--s3", action="store_true", help="source and table in a bucket of a moto server")
    parser.add_argument("--out", type=Path, help="a new folder that stays; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    unknown = set(given.scenes) - {*SCENES, *PEERS}
    if unknown:
        parser.error(f"unknown scenes: {', '.join(sorted(unknown))}")
    sys.path.insert(0, str(ROOT))
    if given.out:
        given.out.mkdir(parents=True)
        found, peers = nights(given, given.out.absolute())
    else:
        with tempfile.TemporaryDirectory(prefix="nightly-") as folder:
            found, peers = nights(given, Path(folder))
    whole = {"nights": [asdict(n) for n in found], "contenders": [asdict(p) for p in peers]}
    print(json.dumps(whole) if given.json else "\n".join(lines(found, peers)))


if __name__ == "__main__":
    main()
