"""Every block of SQL in docs/sql.md, run over a small catalog of products.

Comments at its head say what a block is given and what comes out: `-- parameters: JSON`, `-- frames: JSON`,
`-- rows: N` (else at least one), `-- refused: the message`.
"""

from __future__ import annotations

import json
import re
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conjoin.pipeline import calibration, full_text
from conjoin.pipeline.calibration import Curve
from conjoin.pipeline.embedder import load
from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import Table, open_table

PAGE = (Path(__file__).parents[2] / "docs" / "sql.md").read_text()
NUM_ROWS, DIM = 40, 8
TITLES = ("red shoes", "blue car", "a cat on a mat", "green apple")
MODALITIES = ("image", "text", "audio")


def blocks() -> list[object]:
    """(section, SQL) of every block, named by its section and its number in it."""
    found, section, number = [], "", 0
    for heading, sql in re.findall(r"^## ([^\n]+)$|^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        section, number = (heading, 0) if heading else (section, number + 1)
        if sql:
            found.append(pytest.param(sql, id=f"{section or 'start'}-{number}"))
    return found


def test_every_section_about_sql_has_an_example() -> None:
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    without = [text.splitlines()[0] for text in sections if "```sql" not in text]
    assert set(without) <= {"The shell", "Plain LanceDB"}


@pytest.mark.parametrize("sql", blocks())
def test_an_example_does_what_the_page_says(catalog: Table, sql: str) -> None:
    said = dict(re.findall(r"^-- (parameters|frames|rows|refused): (.+)$", sql, re.MULTILINE))
    params, frames = json.loads(said.get("parameters", "null")), json.loads(said.get("frames", "{}"))
    if "refused" in said:
        with pytest.raises(QueryError) as caught:
            catalog.sql(sql, params, **frames)
        assert said["refused"] in str(caught.value)
        return
    found = catalog.sql(sql, params, **frames)
    assert len(found) == int(said["rows"]) if "rows" in said else len(found) > 0


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, small_encoder: Path) -> Iterator[Table]:
    """`products` as `previous` and as `live`, with what the run file would name; in the current directory."""
    folder = tmp_path_factory.mktemp("catalog")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        uri = str(folder / "products.lance")
        encoder = shutil.copytree(small_encoder, folder / "encoder")
        curves = {"image_text": Curve(slope=12.0, bias=-2.0, num_pairs=1000, error=0.01)}
        calibration.write(str(encoder), load(encoder).fingerprint, curves, "held-out rows")
        for seed, tag in ((1, "previous"), (0, "live")):
            lance.write_dataset(products(encoder, seed), uri, mode="overwrite")
            full_text.index_texts(uri, ["title"])
            dataset = lance.dataset(uri)
            dataset.tags.create(tag, dataset.version)
        Image.new("RGB", (20, 20), (200, 30, 30)).save("red.png")
        write_wav(folder / "clip.wav")
        ids = [f"p-{i % 10:03d}" for i in range(30)]
        pq.write_table(pa.table({"product": ids, "amount": list(range(30))}), "orders.parquet")
        (folder / "prices.csv").write_text("id,price\np-001,12.5\np-002,20.0\n")
        yield open_table(uri, tables={"orders": "orders.parquet", "prices": "prices.csv"})


def products(encoder: Path, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    fingerprint = load(str(encoder)).fingerprint
    rows: dict[str, pa.Array] = {
        "id": pa.array([f"p-{i:03d}" for i in range(NUM_ROWS)]),
        "title": pa.array([f"{TITLES[i % 4]}, number {i}" for i in range(NUM_ROWS)]),
        "brand": pa.array([("acme", "bolt", "coil")[i % 3] for i in range(NUM_ROWS)]),
        "category": pa.array([("shoes", "toys")[i % 2] for i in range(NUM_ROWS)]),
        "price": pa.array(np.round(rng.random(NUM_ROWS) * 100, 2)),
        "stock": pa.array(rng.integers(0, 50, NUM_ROWS)),
    }
    fields = [pa.field(name, values.type) for name, values in rows.items()]
    for modality in MODALITIES:
        name = f"{modality}_vec"
        fields.append(vector_field(name, {"fingerprint": fingerprint, "modality": modality, "encoder": str(encoder)}))
        rows[name] = vectors(rng, fields[-1].type)
    return pa.table(rows, schema=pa.schema(fields))


def vector_field(name: str, facts: dict[str, str]) -> pa.Field:
    facts = {**facts, "metric": "cosine", "dim": str(DIM)}
    metadata = {f"conjoin:{key}": value for key, value in facts.items()}
    return pa.field(name, pa.list_(pa.float32(), DIM), metadata=metadata)


def vectors(rng: np.random.Generator, kind: Any) -> pa.Array:
    values = rng.normal(size=(NUM_ROWS, DIM)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=kind)


def write_wav(path: Path) -> None:
    samples = (np.sin(np.arange(16_000) / 10) * 20_000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
