"""Plain LanceDB tables searched by words after one import of ours, and what happens without it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from conjoin.pipeline import commits, store
from conjoin.pipeline.embedder import load
from conjoin.pipeline.embedding_functions import KEY, embedding_functions
from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import open_table

NUM_ROWS, DIM = 30, 8


@pytest.fixture(scope="module")
def interop() -> object:
    from conjoin import interop

    return interop


def schema(encoder: str, fingerprint: str) -> pa.Schema:
    layout = store.Layout(
        id_type=pa.string(),
        kept=pa.schema([("price", pa.float64())]),
        modalities=("image", "text"),
        uris=("image",),
        thumbnails=False,
        vector_type=pa.list_(pa.float32(), DIM),
        fingerprint=fingerprint,
        encoder=encoder,
    )
    made = store.table_schema(layout)
    return made.with_metadata(embedding_functions(made))


def rows(made: pa.Schema) -> pa.Table:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, NUM_ROWS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    columns = {"id": pa.array([f"p{i}" for i in range(NUM_ROWS)]), "price": pa.array(np.arange(NUM_ROWS) * 1.0)}
    for name, values in zip(("image_vec", "text_vec"), vectors, strict=True):
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=made.field(name).type)
    return pa.table([columns.get(f.name, pa.nulls(NUM_ROWS, f.type)) for f in made], schema=made)


@pytest.fixture
def uri(tmp_path: Path, tiny_encoder: Path) -> str:
    """A table as a night commits it, live."""
    path = str(tmp_path / "things.lance")
    fingerprint = load(str(tiny_encoder)).fingerprint
    made = schema(str(tiny_encoder), fingerprint)
    staged = commits.stage(path, rows(made), mode="create")
    commits.commit(path, commits.Commit("run-1", made, [staged], 0, {store.FINGERPRINT: fingerprint}))
    lance.dataset(path).tags.create("live", 1)
    return path


def opened(uri: str) -> lancedb.table.Table:
    return lancedb.connect(str(Path(uri).parent)).open_table("things")


def nearest(uri: str, column: str, vector: np.ndarray) -> list[str]:
    table = lance.dataset(uri).to_table(columns=["id", column])
    stored = np.array(table[column].to_pylist(), dtype=np.float32)
    return [table["id"][int(i)].as_py() for i in np.argsort(-(stored @ vector))[:3]]


@pytest.mark.parametrize("column", ["image_vec", "text_vec"])
def test_words_find_what_their_vector_finds(interop: object, uri: str, tiny_encoder: Path, column: str) -> None:
    found = opened(uri).search("red apple", vector_column_name=column).limit(3).to_list()
    vector = load(str(tiny_encoder)).encode(text=["red apple"])[0]
    assert [row["id"] for row in found] == nearest(uri, column, vector)


@pytest.mark.parametrize("as_bytes", [False, True], ids=["PIL", "bytes"])
def test_a_picture_finds_what_its_vector_finds(interop: object, uri: str, tiny_encoder: Path, as_bytes: bool) -> None:
    picture, data = Image.new("RGB", (20, 20), (200, 30, 30)), io.BytesIO()
    picture.save(data, format="PNG")
    query = data.getvalue() if as_bytes else picture
    found = opened(uri).search(query, vector_column_name="image_vec", query_type="vector").limit(3).to_list()
    vector = load(str(tiny_encoder)).encode(image=[data.getvalue()])[0]
    assert [row["id"] for row in found] == nearest(uri, "image_vec", vector)


def test_a_folder_with_another_encoder_is_refused(interop: object, tmp_path: Path, tiny_encoder: Path) -> None:
    made = schema(str(tiny_encoder), "f" * 32)
    lance.write_dataset(rows(made), str(tmp_path / "things.lance"))
    with pytest.raises(QueryError, match="made by encoder ffffffffffff, but the folder now holds"):
        opened(str(tmp_path / "things.lance")).search("red apple", vector_column_name="image_vec").to_list()


def test_adding_rows_without_vectors_is_refused(interop: object, uri: str) -> None:
    table = opened(uri)
    with pytest.raises(RuntimeError, match=r"not added to a conjoin table by hand.*conjoin run"):
        table.add([{"id": "new", "price": 1.0, "text": "red apple"}])
    assert table.count_rows() == NUM_ROWS


def test_vectors_that_somebody_adds_are_not_live(interop: object, uri: str) -> None:
    table = opened(uri)
    table.add([{"id": "new", "price": 1.0, "image_vec": [1.0] * DIM, "text_vec": [1.0] * DIM}])
    assert table.count_rows() == NUM_ROWS + 1
    ours = open_table(uri)
    assert (ours.version, len(ours.sql("SELECT id FROM things"))) == (1, NUM_ROWS)


def test_without_our_import_vector_search_works_and_words_stop(uri: str) -> None:
    code = (
        "import sys, lancedb\n"
        "table = lancedb.connect(sys.argv[1]).open_table('things')\n"
        "print(len(table.search([1.0] * 8, vector_column_name='image_vec').limit(3).to_list()))\n"
        "def tries(action):\n"
        "    try: action()\n"
        "    except KeyError as error: print(error)\n"
        "tries(lambda: table.search('red', vector_column_name='image_vec').to_list())\n"
        "tries(lambda: table.add([{'id': 'new', 'image_vec': [1.0] * 8}]))\n"
        "print(table.count_rows())\n"
    )
    command = [sys.executable, "-c", code, str(Path(uri).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "'conjoin'", "'conjoin'", str(NUM_ROWS)]


def test_the_metadata_names_every_vector_column_and_what_it_came_from() -> None:
    found = json.loads(embedding_functions(schema("/encoders/one", "f" * 32))[KEY])
    assert [(entry["vector_column"], entry["source_column"], entry["name"]) for entry in found] == [
        ("image_vec", "id", "conjoin"),
        ("text_vec", "id", "conjoin"),
    ]
    assert found[0]["model"] == {"encoder": "/encoders/one", "fingerprint": "f" * 32, "modality": "image", "dim": DIM}
    assert embedding_functions(pa.schema([("id", pa.string())])) == {}
