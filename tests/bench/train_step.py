"""Speed and memory of training, beside the bare torch step and sentence-transformers:
python tests/bench/train_step.py DATA.parquet [--peer-python PYTHON] [--only speed|memory] [--json].

DATA has columns `image` (bytes) and `caption`. Every contender trains the same towers on the same rows in the same
batches (float32, AdamW, symmetric InfoNCE), in a process of its own under the settings of pipeline/workers.MALLOC_ENV;
contenders take turns, the first steps are left out, and medians over the turns are printed; a ratio is the median of
the turns' own, since machines drift. `--contenders bare whole` takes those whose names begin so. What is counted:

  bare    towers on decoded pixels and token ids in memory, the loss, the optimizer: nothing can be faster
  peer    sentence-transformers' trainer on PIL pictures of the final size in memory: pictures to tensors, tokenising
  step    our step on decoded values in memory, in one micro-batch (plain) or four (cached gradients)
  whole   our training from Parquet on Ray: reading, decoding, augmenting, tokenising, a checkpoint in the middle
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tiny_clip
from PIL import Image
from step_ours import Job

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAIRS = ("builtin", "clip")
SIZE_PX = {"builtin": 48, "clip": 64}
DIM = 256
ROW_GROUP = 1024
MICRO_ROWS = 256
SPEED_TARGET, MEMORY_TARGET = 0.90, 1.3
Result = dict[str, object]


@dataclass(frozen=True, slots=True)
class Contender:
    """script and kind: what runs; cached: micro-batches of a quarter of the batch."""

    name: str
    pair: str
    script: str
    kind: str
    cached: bool = False
    workers: int = 1


CONTENDERS = (
    *(Contender("bare", pair, "step_ours.py", "bare") for pair in PAIRS),
    *(Contender("step, plain", pair, "step_ours.py", "step") for pair in PAIRS),
    *(Contender("step, cached", pair, "step_ours.py", "step", cached=True) for pair in PAIRS),
    *(Contender("whole, 1 worker", pair, "step_ours.py", "whole") for pair in PAIRS),
    *(Contender("whole, 2 workers", pair, "step_ours.py", "whole", workers=2) for pair in PAIRS),
    Contender("peer, plain", "clip", "step_peer.py", "plain"),
    Contender("peer, cached", "clip", "step_peer.py", "cached", cached=True),
)


def prepare(data: str, num_rows: int, folder: Path) -> None:
    """rows.parquet, texts.json, pixels of each size as every contender sees them, and the small CLIP."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from conjoin.encoders.spec import ImageTransform
    from conjoin.encoders.transforms import fit_image

    images: list[bytes] = []
    texts: list[str] = []
    for batch in pq.ParquetFile(data).iter_batches(4_000, columns=["image", "caption"]):
        rows = zip(batch["image"].to_pylist(), batch["caption"].to_pylist(), strict=True)
        for image, text in [(image, text) for image, text in rows if image and text and text.strip()]:
            images, texts = [*images, image], [*texts, text]
        if len(images) >= num_rows:
            break
    images, texts = images[:num_rows], texts[:num_rows]
    table = pa.table({"id": np.arange(len(images)), "image": images, "caption": texts})
    pq.write_table(table, folder / "rows.parquet", row_group_size=ROW_GROUP)
    (folder / "texts.json").write_text(json.dumps(texts))
    for size in set(SIZE_PX.values()):
        transform = ImageTransform(size_px=size)
        fitted = np.stack([fit_image(Image.open(io.BytesIO(image)), transform) for image in images])
        np.save(folder / f"pixels-{size}.npy", fitted)
    (folder / "clip").mkdir()
    tiny_clip.save(folder / "clip", texts, SIZE_PX["clip"], DIM)


def job_of(contender: Contender, given: argparse.Namespace, folder: Path) -> Job:
    model = {"model": str(folder / "clip"), "head": "none"}
    towers = {"image": model, "text": model} if contender.pair == "clip" else {"image": {"size_px": 48}, "text": {}}
    micro = -(-given.batch // (4 if contender.cached else contender.workers))
    return Job(
        folder=str(folder),
        towers=towers,
        size_px=SIZE_PX[contender.pair],
        dim=DIM,
        batch=given.batch,
        micro=micro,
        steps=given.warmup + given.steps,
        workers=contender.workers,
        threads=len(os.sched_getaffinity(0)),
    )


def run(python: str, script: str, kind: str, job: Job) -> Result:
    """The contender's JSON line. Raises SystemExit with the end of what it said where it fails."""
    from conjoin.pipeline.workers import MALLOC_ENV

    environment = {**os.environ, **MALLOC_ENV, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    path = Path(job.folder, "job.json")
    path.write_text(json.dumps(asdict(job)))
    command = [python, str(HERE / script), kind, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


def rate(result: Mapping[str, object], warmup: int) -> float:
    """Rows per second over the steps after warm-up."""
    rows, ends = result["rows"], result["ends"]
    assert isinstance(rows, list)
    assert isinstance(ends, list)
    return float(sum(rows[warmup:]) / (ends[-1] - ends[warmup - 1]))


def speed(given: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
    """samples/s of every turn, by pair of towers and contender."""
    rates: dict[str, dict[str, list[float]]] = {pair: {} for pair in given.towers}
    for turn in range(given.repeats):
        for contender in CONTENDERS:
            python = given.peer_python if contender.script == "step_peer.py" else sys.executable
            if contender.pair not in given.towers or python is None or not contender.name.startswith(given.contenders):
                continue
            found = rate(run(python, contender.script, contender.kind, job_of(contender, given, folder)), given.warmup)
            rates[contender.pair].setdefault(contender.name, []).append(found)
            say(f"turn {turn + 1}: {contender.pair:<8} {contender.name:<17} {found:8.1f} samples/s")
    return rates


def memory(given: argparse.Namespace, folder: Path) -> list[Result]:
    """Peak and seconds of our step by global batch, micro-batches of one size."""
    found = []
    like = job_of(Contender("step", "builtin", "step_ours.py", "memory"), given, folder)
    for batch in given.memory_batches:
        job = replace(like, batch=batch, micro=min(MICRO_ROWS, batch), steps=2)
        found.append({"batch": batch, **run(sys.executable, "step_ours.py", "memory", job)})
        say(f"memory at {batch:,}: {found[-1]}")
    return found


def speed_lines(rates: Mapping[str, Mapping[str, Sequence[float]]], has_peer: bool) -> list[str]:
    """A table a pair of towers; ratios of medians."""
    lines = []
    for pair, by_name in rates.items():
        medians = {name: statistics.median(found) for name, found in by_name.items()}
        peers = [name for name in medians if name.startswith("peer")]
        peer = max(peers, key=lambda name: medians[name], default=None)
        of_bare = {name: _ratio(found, by_name["bare"]) for name, found in by_name.items()}
        lines += ["", f"{pair:<20} {'samples/s':>10} {'of bare':>8} {'of peer':>8}   turns"]
        for name, value in medians.items():
            of_peer = f"{_ratio(by_name[name], by_name[peer]):8.2f}" if peer else f"{'':8}"
            turns = " ".join(f"{one:.0f}" for one in by_name[name])
            lines.append(f"{name:<20} {value:>10.1f} {of_bare[name]:>8.2f} {of_peer}   {turns}")
        for name in [name for name in medians if name.startswith("whole")]:
            lines.append(f"target: {name} >= {SPEED_TARGET:.2f} of bare: {verdict(of_bare[name] >= SPEED_TARGET)}")
            if peer:
                met = _ratio(by_name[name], by_name[peer]) >= 1
                lines.append(f"target: {name} >= the faster peer: {verdict(met)}")
        if pair == "clip" and not has_peer:
            lines.append("peer (sentence-transformers): not installed; name an interpreter with --peer-python")
    return lines


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the turns."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def memory_lines(found: Sequence[Mapping[str, object]]) -> list[str]:
    """Peaks without the batch's own inputs, and their ratios to the first batch."""
    peaks = [(int(str(one["peak"])) - int(str(one["inputs"]))) / 2**20 for one in found]
    rates = [int(str(one["batch"])) / float(str(one["seconds"])) for one in found]
    lines = [
        "",
        f"{'global batch':>12} {'peak MB':>8} {'inputs':>7} {'rest':>7} {'ratio':>6} {'rows/s':>7} {'ratio':>6}",
    ]
    for one, peak, speed_ in zip(found, peaks, rates, strict=True):
        inputs = int(str(one["inputs"])) / 2**20
        lines.append(
            f"{one['batch']:>12,} {peak + inputs:>8,.0f} {inputs:>7,.0f} {peak:>7,.0f} {peak / peaks[0]:>6.2f} "
            f"{speed_:>7,.0f} {speed_ / rates[0]:>6.2f}"
        )
    met = verdict(peaks[-1] <= MEMORY_TARGET * peaks[0])
    return [*lines, f"target: the rest at {found[-1]['batch']:,} within {MEMORY_TARGET} of the first: {met}"]


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a Parquet file")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=6, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=18, help="steps that are")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender")
    parser.add_argument("--towers", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--contenders", nargs="+", default=("",), metavar="NAME", help="how their names begin")
    parser.add_argument("--memory-batches", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--peer-python", help="an interpreter with sentence-transformers, datasets and accelerate")
    parser.add_argument("--only", choices=("speed", "memory"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.contenders = tuple(given.contenders)
    if not "bare".startswith(given.contenders):
        parser.error("--contenders: `bare` is what the others are measured by")
    return given


def main() -> None:
    sys.path.insert(0, str(ROOT))
    given = arguments()
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        prepare(given.data, given.rows, Path(folder))
        rates = speed(given, Path(folder)) if given.only != "memory" else {}
        peaks = memory(given, Path(folder)) if given.only != "speed" else []
    if given.json:
        print(json.dumps({"samples_per_s": rates, "memory": peaks}))
        return
    lines = speed_lines(rates, given.peer_python is not None) + (memory_lines(peaks) if peaks else [])
    print("\n".join(lines).strip())


if __name__ == "__main__":
    main()
