"""Rows, vectors and questions of the query bench: a folder that every program reads, so that all see the same numbers.

Assumes: the vectors are real ones: built-in towers are trained for a minute on a part of the icons, then embed all
pictures and captions; more rows than the file has are the same ones again, moved a little. `stock` is a random order
of the rows, so that `stock < share * rows` passes that share. The exact answers come from NumPy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

K = 10
SHARES = (1.0, 0.5, 0.05, 0.005, 0.0005)
SINGLE, TUNING, BATCH, JOINED = 200, 50, 1_000, 2_000
PAIRS_PER_ROW = 5
EQUAL = 1e-6  # similarities of one pair that two programs computed
_MOVED = 0.3  # length of what is added to a unit vector that is there again
_GAP = 4e-6


@dataclass(frozen=True, slots=True)
class Data:
    """vectors: (N, D) float32, unit; titles, stock: (N,); queries: (SINGLE + TUNING + BATCH, D), unit.

    radius: of near-duplicates of the rows whose stock is below `JOINED`; words: SINGLE texts of one to three words.
    """

    folder: Path
    vectors: np.ndarray
    titles: list[str]
    stock: np.ndarray
    queries: np.ndarray
    words: list[str]
    radius: float

    @property
    def single(self) -> np.ndarray:
        """(SINGLE, D): asked one by one."""
        return self.queries[:SINGLE]

    @property
    def tuning(self) -> np.ndarray:
        """(TUNING, D): what a program may choose its settings by."""
        return self.queries[SINGLE : SINGLE + TUNING]

    @property
    def batch(self) -> np.ndarray:
        """(BATCH, D): asked at once."""
        return self.queries[SINGLE + TUNING :]

    def most(self, share: float) -> int:
        """`stock` is below this for that share of the rows."""
        return round(share * len(self.stock))

    def recall(self, queries: np.ndarray, found: list[list[int]], share: float = 1.0) -> float:
        """Share of the K nearest rows that were found; of equally near ones any counts, a row counts once."""
        rows = np.flatnonzero(self.stock < self.most(share))
        wanted = min(K, len(rows))
        hits = 0
        for start in range(0, len(found), 100):
            some = queries[start : start + 100][: len(found) - start]
            similar = some @ self.vectors[rows].T
            kth = np.partition(similar, len(rows) - wanted, axis=1)[:, len(rows) - wanted]
            for query, least, ids in zip(some, kth, found[start : start + 100], strict=False):
                own = [i for i in set(ids) if self.stock[i] < self.most(share)]
                hits += min(int((self.vectors[own] @ query >= least - EQUAL).sum()), wanted)
        return hits / (wanted * len(found))

    def pairs(self) -> set[tuple[int, int]]:
        """All near-duplicates of the rows whose stock is below JOINED, but of themselves."""
        return pairs_within(self.vectors, np.flatnonzero(self.stock < JOINED), self.radius)


def pairs_within(vectors: np.ndarray, left: np.ndarray, radius: float) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for start in range(0, len(left), 250):
        rows = left[start : start + 250]
        at, other = np.nonzero(1 - vectors[rows] @ vectors.T < radius)
        found |= {(int(rows[i]), int(j)) for i, j in zip(at, other, strict=True) if rows[i] != j}
    return found


def load(folder: Path) -> Data:
    facts = json.loads((folder / "facts.json").read_text())
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("vectors", "stock", "queries")]
    vectors, stock, queries = (np.ascontiguousarray(array) for array in arrays)
    return Data(folder, vectors, facts["titles"], stock, queries, facts["words"], facts["radius"])


def make(parquet: Path, folder: Path, rows: int) -> Data:
    """What is there already is not made again."""
    here = folder / f"rows-{rows}"
    if not (here / "facts.json").exists():
        here.mkdir(parents=True, exist_ok=True)
        images, texts, titles = _embedded(parquet, folder, rows)
        _write(here, *_repeated(images, texts, titles, rows))
    return load(here)


def encoder(folder: Path) -> Path:
    """Of the bench that lies in a folder."""
    return next((folder / "encoders").glob("*/best/spec.json")).parent


def _embedded(parquet: Path, folder: Path, rows: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Of the first rows of the file, kept for other numbers of rows."""
    import pyarrow.parquet as pq

    from conjoin.pipeline import embedder

    table = pq.read_table(parquet, columns=["id", "image", "caption"])
    titles, kept = table["caption"].to_pylist(), folder / "embedded.npz"
    if not kept.exists():
        if not (folder / "encoders").exists():
            _train(parquet, folder)
        towers = embedder.load(str(encoder(folder)))
        images = towers.encode(image=table["image"].to_pylist())
        np.savez(kept, images=images.astype(np.float32), texts=towers.encode(text=titles).astype(np.float32))
    found = np.load(kept)
    images, texts = found["images"], found["texts"]
    good = np.flatnonzero(np.isfinite(images).all(1) & np.isfinite(texts).all(1))[:rows]
    return images[good], texts[good], [titles[i] for i in good]


def _train(parquet: Path, folder: Path) -> None:
    from conjoin.pipeline.recipe import TrainConfig
    from conjoin.pipeline.source import SourceConfig
    from conjoin.pipeline.train import train

    columns = {"path": str(parquet), "id": "id", "group": "caption", "image": "image", "text": "caption"}
    recipe = {"towers": {"image": {"size_px": 32}, "text": {}}, "epochs": 3, "global_batch_size": 256}
    where = {"where": "hash(id) % 12 = 0", "output": str(folder / "encoders")}
    train("bench", SourceConfig.model_validate(columns), TrainConfig.model_validate({**recipe, **where}))


def _repeated(
    images: np.ndarray, texts: np.ndarray, titles: list[str], rows: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """So often that there are enough rows; every time but the first moved a little, and of unit length again."""
    rng, made = np.random.default_rng(0), []
    for vectors in (images, texts):
        out = np.empty((rows, vectors.shape[1]), np.float32)
        for start in range(0, rows, len(vectors)):
            part = vectors[: rows - start]
            if start:
                step = rng.normal(size=part.shape).astype(np.float32)
                part = part + _MOVED * step / np.linalg.norm(step, axis=1, keepdims=True)
            out[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
        made.append(out)
    return made[0], made[1], [titles[i % len(titles)] for i in range(rows)]


def _write(here: Path, images: np.ndarray, texts: np.ndarray, titles: list[str]) -> None:
    """Half of the queries are pictures, moved; half are words that somebody could type: captions of the rows."""
    rng, number = np.random.default_rng(1), SINGLE + TUNING + BATCH
    stock = rng.permutation(len(images))
    some = rng.choice(len(images), number, replace=len(images) < number)
    step = rng.normal(size=(number, images.shape[1]))
    moved = images[some] + _MOVED * step / np.linalg.norm(step, axis=1, keepdims=True)
    queries = np.where(np.arange(number)[:, None] % 2 == 0, moved, texts[some])
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    words = [titles[i] for i in some if any(c.isalnum() for c in titles[i])][:SINGLE]
    facts = {"titles": titles, "words": words, "radius": _radius(images, np.flatnonzero(stock < JOINED))}
    for name, values in {"vectors": images, "texts": texts, "stock": stock, "queries": queries}.items():
        np.save(here / f"{name}.npy", values)
    (here / "facts.json").write_text(json.dumps(facts))


def _radius(images: np.ndarray, left: np.ndarray) -> float:
    """Within which a row has so many others on average; clear of every distance, which programs round differently."""
    nearest = []
    for start in range(0, len(left), 250):
        distances = 1 - images[left[start : start + 250]] @ images.T
        nearest.append(np.sort(np.partition(distances, 50, axis=1)[:, :50], axis=1)[:, 1:].ravel())
    ordered = np.sort(np.concatenate(nearest))
    at = PAIRS_PER_ROW * len(left)
    at += int(np.argmax(np.diff(ordered[at - 1 :]) > _GAP))
    return round(float(ordered[at - 1] + ordered[at]) / 2, 8)
