"""Rows, vectors and questions of the query bench: a folder that every program reads, so that all see the same numbers.

Assumes: the vectors are the 256 principal components of the icons' pixels; more rows than the file has are the same
again, moved a little. What they mean is of no interest here, how they lie is. `stock` is a random order of
the rows, so that `stock < share * rows` passes that share. The exact answers come from NumPy.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

K = 10
SHARES = (1.0, 0.5, 0.05, 0.005, 0.0005)
SINGLE, TUNING, BATCH, JOINED = 200, 50, 1_000, 500
PAIRS_PER_ROW = 5
EQUAL = 1e-6  # similarities of one pair that two programs computed
SIDE, DIM = 24, 256
UNSEEN = 650  # pictures that are queries and no rows
MOVED = 0.3  # length of what is added to a unit vector that is there again
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
        pictures, titles = _embedded(parquet, folder)
        kept = len(pictures) - UNSEEN
        images = _repeated(pictures[:kept], rows)
        _write(here, images, [titles[i % kept] for i in range(rows)], pictures[kept:])
    return load(here)


def encoder(folder: Path) -> Path:
    """Of the bench that lies in a folder."""
    return folder / "encoder"


def _embedded(parquet: Path, folder: Path) -> tuple[np.ndarray, list[str]]:
    """All pictures of the file in random order, kept for other numbers of rows."""
    import pyarrow.parquet as pq

    table = pq.read_table(parquet, columns=["image", "caption"])
    order, kept = np.random.default_rng(2).permutation(len(table)), folder / "embedded.npy"
    if not kept.exists():
        _make_encoder(encoder(folder))
        np.save(kept, _components(np.stack([_pixels(data) for data in table["image"].to_pylist()])))
    titles = table["caption"].to_pylist()
    return np.load(kept)[order], [titles[i] for i in order]


def _pixels(data: bytes) -> np.ndarray:
    """(SIDE * SIDE,) float32 of a picture on white, in grey."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        grey = picture.convert("RGBA").convert("La").resize((SIDE, SIDE))
    luminance, alpha = np.asarray(grey, np.float32).reshape(-1, 2).T
    return luminance + 255 - alpha


def _components(pixels: np.ndarray) -> np.ndarray:
    """(N, DIM) of unit length: the principal components of the pictures."""
    pixels -= pixels.mean(axis=0)
    _, axes = np.linalg.eigh(pixels.T @ pixels)
    vectors = pixels @ axes[:, -DIM:] + 1e-3  # pictures without anything on them have a direction too
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def _make_encoder(folder: Path) -> None:
    """For the words of hybrid searches, whose vectors have to come from somewhere."""
    import torch

    from conjoin.encoders.checkpoint import save
    from conjoin.encoders.joint import build
    from conjoin.encoders.towers import TowerOptions

    torch.manual_seed(0)
    towers = {"image": TowerOptions(size_px=16), "text": TowerOptions(max_tokens=16)}
    save(build(towers, DIM, ["arrow left", "home", "cloud upload", "user circle outline"]), folder, {})


def _repeated(vectors: np.ndarray, rows: int) -> np.ndarray:
    """(rows, D): the same again, every time but the first moved a little, and of unit length."""
    rng, out = np.random.default_rng(0), np.empty((rows, vectors.shape[1]), np.float32)
    for start in range(0, rows, len(vectors)):
        part = vectors[: rows - start]
        out[start : start + len(part)] = _moved(part, rng) if start else part
    return out


def _moved(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """By a step of MOVED in a random direction, and of unit length again."""
    step = rng.normal(size=vectors.shape).astype(np.float32)
    moved = vectors + MOVED * step / np.linalg.norm(step, axis=1, keepdims=True)
    return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True), np.float32)


def _write(here: Path, images: np.ndarray, titles: list[str], unseen: np.ndarray) -> None:
    """Half of the queries are pictures of the table, moved; half are pictures that are not in it."""
    rng, number = np.random.default_rng(1), SINGLE + TUNING + BATCH
    stock = rng.permutation(len(images))
    some = rng.choice(len(images), number, replace=len(images) < number)
    queries = _moved(images[some], rng)
    queries[1::2] = unseen[: len(queries[1::2])]
    words = [titles[i] for i in some if any(c.isalnum() for c in titles[i])][:SINGLE]
    facts = {"titles": titles, "words": words, "radius": _radius(images, np.flatnonzero(stock < JOINED))}
    for name, values in {"vectors": images, "stock": stock, "queries": queries}.items():
        np.save(here / f"{name}.npy", values)
    (here / "facts.json").write_text(json.dumps(facts))


def _radius(images: np.ndarray, left: np.ndarray) -> float:
    """Within which a row has so many others on average; clear of every distance, which programs round differently."""
    most, nearest = PAIRS_PER_ROW * len(left), np.empty(0, np.float32)
    for start in range(0, len(left), 250):
        distances = (1 - images[left[start : start + 250]] @ images.T).ravel()
        nearest = np.partition(np.concatenate([nearest, distances]), 2 * most + len(left))[: 2 * most + len(left)]
    ordered = np.sort(nearest)[len(left) :]  # without themselves
    at = most + int(np.argmax(np.diff(ordered[most - 1 :]) > _GAP))
    return round(float(ordered[at - 1] + ordered[at]) / 2, 8)
