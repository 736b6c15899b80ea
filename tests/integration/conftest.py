"""A small catalog of drawn shapes, some rows unusable, and the real `conjoin` command in a process of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from bucket import Bucket
from PIL import Image, ImageDraw
from shop import row

from conjoin.pipeline import embed

COLOURS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = ("circle", "square", "bar", "cross")
NUM_ROWS = 120
NUM_REPEATS = 20


@dataclass(frozen=True, slots=True)
class Things:
    """The source's rows; positions without a usable picture or text; what must be in quarantine, with its stage."""

    rows: pa.Table
    no_image: tuple[int, ...]
    no_text: tuple[int, ...]
    quarantined: Mapping[tuple[str, str], str]

    @property
    def ids(self) -> list[str]:
        return self.rows["id"].to_pylist()

    @property
    def landed(self) -> list[str]:
        """Ids that the table must have, in order: those with a usable value in any modality."""
        gone = set(self.no_image) & set(self.no_text)
        return [key for row, key in enumerate(self.ids) if row not in gone]


def drawn(colour: str, shape: str, rng: np.random.Generator) -> bytes:
    image = Image.new("RGB", (24, 24), "white")
    draw = ImageDraw.Draw(image)
    x, y, r = (int(value) for value in (*rng.integers(7, 17, 2), rng.integers(4, 7)))
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "bar":
        draw.rectangle((x - r, y - 2, x + r, y + 2), fill=colour)
    else:
        draw.line((x - r, y - r, x + r, y + r), fill=colour, width=2)
        draw.line((x - r, y + r, x + r, y - r), fill=colour, width=2)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="session")
def things() -> Things:
    """120 shapes; the last 20 repeat the contents of the first 20; nulls and unusable values in both modalities."""
    rng = np.random.default_rng(0)
    pairs = [(COLOURS[i % 6], SHAPES[i // 6 % 4]) for i in range(NUM_ROWS - NUM_REPEATS)]
    images: list[bytes | None] = [drawn(*pair, rng) for pair in pairs]
    texts: list[str | None] = [f"a {colour} {shape}, number {n}" for n, (colour, shape) in enumerate(pairs)]
    images, texts = images + images[:NUM_REPEATS], texts + texts[:NUM_REPEATS]
    images[33] = images[37] = b"torn"
    texts[35] = texts[37] = "  "
    images[41] = texts[43] = images[39] = texts[39] = None
    ids = [f"thing-{n:03d}" for n in rng.permutation(NUM_ROWS)]
    rows = pa.table(
        {
            "id": ids,
            "picture": pa.array(images, pa.binary()),
            "caption": pa.array(texts),
            "price": pa.array(np.round(rng.random(NUM_ROWS) * 100, 2)),
            "tags": pa.array([[COLOURS[i % 6]] if i % 7 else None for i in range(NUM_ROWS)], pa.list_(pa.string())),
        }
    )
    quarantined = {
        (ids[33], "image"): "decode",
        (ids[35], "text"): "decode",
        (ids[37], "image"): "decode",
        (ids[37], "text"): "decode",
        (ids[39], ""): "read",
    }
    return Things(rows, (33, 37, 39, 41), (35, 37, 39, 43), quarantined)


@pytest.fixture(scope="session")
def things_encoder(things: Things, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: pictures at 16 px and the captions' own words into 8 dimensions."""
    import torch

    from conjoin.encoders.checkpoint import save
    from conjoin.encoders.joint import build
    from conjoin.encoders.options import TowerOptions

    torch.manual_seed(0)
    towers = {"image": TowerOptions(size_px=16, width=16), "text": TowerOptions(max_tokens=16, width=16)}
    folder = tmp_path_factory.mktemp("encoder") / "things"
    save(build(towers, 8, [text for text in things.rows["caption"].to_pylist() if text]), folder, {})
    return folder


@pytest.fixture(scope="session")
def run_file_in(things_encoder: Path) -> Callable[..., Path]:
    """run_file_in(folder, source, table=..., unit_rows=..., **source columns) -> the path of a run file of things."""

    def write(folder: Path, source: str | list[str], table: str = "", unit_rows: int = 30, **columns: object) -> Path:
        raw = {
            "name": "things",
            "source": {
                "path": source,
                "id": "id",
                "image": "picture",
                "text": "caption",
                "keep": ["price", "tags"],
                **columns,
            },
            "encoder": str(things_encoder),
            "table": {"path": table or f"{folder}/things.lance", "thumbnail_px": 32},
            "embed": {"unit_rows": unit_rows, "max_bad_fraction": 0.1},
            "gates": {"quarantine": 0.1, "hit_at_10_drop": 1},
            "upkeep": {"compact_mb": 0},  # the fragments that units left are looked at
        }
        path = folder / "conjoin.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.fixture
def run_file(tmp_path: Path, run_file_in: Callable[..., Path]) -> Callable[..., Path]:
    """The same in the test's own folder."""
    return partial(run_file_in, tmp_path)


@dataclass(frozen=True, slots=True)
class Command:
    """`conjoin ...` in a process group of its own, as a terminal would start it."""

    prefix: tuple[str, ...] = (sys.executable, "-c", "from conjoin.jobs.cli import main; main()")

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.prefix, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        with self.start(*words) as process:
            out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def draw_shape() -> Callable[[str, str, np.random.Generator], bytes]:
    """(colour, shape, rng) -> a PNG of 24 px."""
    return drawn


@pytest.fixture
def conjoin() -> Command:
    return Command()


@pytest.fixture
def bucket(s3: str, _moto: str, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """18 records in three files, published by a good night."""
    monkeypatch.setattr(embed, "_run_units", embed._run_here)  # Ray adds nothing to what is asked of a bucket
    made = Bucket(s3, _moto, tiny_encoder, monkeypatch)
    made.write(a=[row(n) for n in range(8)], b=[row(n) for n in range(8, 14)], c=[row(n) for n in range(14, 18)])
    made.night(_moto)
    return made
