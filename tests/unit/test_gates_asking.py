"""Gates that ask the source and the encoder: rows embedded again, golden queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gated import by_name, catalog

from conjoin.pipeline import index, measures, source, state, store
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.errors import ConfigError, GateError
from conjoin.pipeline.gates import Expected, Gates, check_gates, check_indexed


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure of recall is looked at closely."""
    monkeypatch.setattr(measures, "QUERIES", 12)


@pytest.fixture
def embedded(tmp_path: Path, nights: Any, tiny_encoder: Path) -> tuple[Any, Catalog]:
    """A table of 90 captions embedded from two source files, its manifest and state beside it."""
    from conjoin.pipeline.embedder import load

    words = ["red apple", "green apple", "a cat on a mat", "blue car", "tree and flower", "dog"]
    captions = [f"{words[i % 6]} {words[i // 6 % 6]} {i}" for i in range(90)]
    folder = tmp_path / "catalog"
    folder.mkdir()
    for part in range(2):
        some = range(part * 45, part * 45 + 45)
        rows = pa.table({"id": [f"p{i}" for i in some], "caption": [captions[i] for i in some]})
        pq.write_table(rows, folder / f"{part}.parquet", row_group_size=20)
    encoder = load(tiny_encoder)
    config = catalog(nights.uri, str(folder), str(tiny_encoder))
    ids = pa.array([f"p{i}" for i in range(90)])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(encoder.encode(text=captions).ravel()), 8)
    facts = {"fingerprint": encoder.fingerprint, "modality": "text", "metric": "cosine", "dim": "8"}
    metadata = {f"conjoin:{key}": value for key, value in {**facts, "encoder": str(tiny_encoder)}.items()}
    hashes = source.content_hashes(pa.array(captions))
    fields = [("id", pa.string()), ("text_hash", pa.binary(16))]
    schema = pa.schema([*fields, pa.field("text_vec", vectors.type, metadata=metadata)])
    properties = {"run_id": "r1", store.STATE: state.manifest_path("r1")}
    table = pa.table([ids, hashes, vectors], schema=schema)
    staged = lance.fragment.write_fragments(table, nights.uri, schema=schema, mode="create")
    transaction = lance.Transaction(
        0, lance.LanceOperation.Overwrite(schema, staged), transaction_properties=properties
    )
    lance.LanceDataset.commit(nights.uri, transaction, enable_stable_row_ids=False)
    files = source.list_source(config.source)
    described = []
    for number, file in enumerate(files):
        rows = pa.table(
            {
                "row_group": pa.array(np.arange(45) // 20, pa.int32()),
                "row": pa.array(np.arange(45) % 20),
                "id": ids.slice(number * 45, 45),
            }
        )
        path = f"state/r1/{number:05d}.parquet"
        store.storage.write_bytes(f"{store.bookkeeping(nights.uri)}/{path}", state.parquet_bytes(rows))
        described.append(state.FileState(file, path))
    manifest = state.Manifest("r1", encoder.fingerprint, str(tiny_encoder), "", "", 90, tuple(described), ("r1",))
    state.write_manifest(nights.uri, manifest)
    return nights.publish(), config


def promise(dataset: Any) -> Expected:
    column = store.vector_columns(dataset)["text_vec"]
    return Expected(dataset.count_rows(), column.fingerprint, ("text_vec",))


def test_stored_vectors_are_those_of_the_source(embedded: tuple[Any, Catalog]) -> None:
    dataset, config = embedded
    found = by_name(check_gates(dataset, promise(dataset), ALIKE, None, config))["embedded again: text_vec"]
    assert found.passed
    assert "0 of 16 sampled rows embed to something else" in found.detail


def test_stored_vectors_of_other_records(embedded: tuple[Any, Catalog], nights: Any) -> None:
    """Vectors that came one row too late: whole, of unit length, told apart, and all wrong."""
    dataset, config = embedded
    rows = dataset.to_table(columns=["id", "text_vec"])
    order = pa.array(np.roll(np.arange(90), 1))
    late = pa.table([rows["id"], rows["text_vec"].take(order)], names=["id", "text_vec"])
    facts = store.run_of(dataset)
    changed = nights.next("r2", columns=late, properties=facts)
    with pytest.raises(
        GateError, match=r"embedded again: text_vec: text_vec: \d+ of 16 sampled rows embed to something"
    ):
        check_gates(changed, promise(dataset), ALIKE, dataset, config)


def test_a_source_file_that_was_replaced_is_left_to_the_next_night(embedded: tuple[Any, Catalog]) -> None:
    dataset, config = embedded
    path = Path(str(config.source.path)) / "0.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.set_column(1, "caption", pa.array(["something else"] * 45)), path)
    found = by_name(check_gates(dataset, promise(dataset), ALIKE, None, config))["embedded again: text_vec"]
    assert "0 of 8 sampled rows embed to something else" in found.detail


ALIKE = Gates(duplicate_vectors=1)  # so small an encoder knows few words


def golden(path: Path, lines: list[str]) -> Gates:
    (path / "golden.csv").write_text("\n".join(["query,expected", *lines]))
    return ALIKE.model_copy(update={"golden": f"{path}/golden.csv"})


def test_golden_queries_that_are_lost_are_named(embedded: tuple[Any, Catalog], nights: Any, tmp_path: Path) -> None:
    live, config = embedded
    index.build(nights.uri, config.table)
    live = nights.publish()
    limits = golden(tmp_path, ["red apple red apple 0,p0|nothing", "dog red apple 5,p5"])
    good = by_name(check_indexed(store.open_version(nights.uri), promise(live), limits, config))["golden queries"]
    assert (good.passed, good.value) == (True, 1.0)
    nights.next("r2", delete=["p5"], properties=store.run_of(live))
    index.build(nights.uri, config.table)
    head = store.open_version(nights.uri, None)
    with pytest.raises(GateError, match=r"golden queries: 1 of 2 .*in live 2; .*lost: 'dog red apple 5'"):
        check_indexed(head, promise(head), limits, config, live)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words,ids\na,b\n", "the columns are words, ids"),
        ("query,expected\nred,\n", "line 2 lacks a query or an id"),
        ("query,expected\n", "there is no query in it"),
        ("query,expected,column\nred,p1,nowhere\n", "there is no vector column 'nowhere'"),
    ],
    ids=["columns", "id", "empty", "column"],
)
def test_a_golden_file_that_cannot_be_used(
    embedded: tuple[Any, Catalog], nights: Any, tmp_path: Path, text: str, message: str
) -> None:
    live, config = embedded
    index.build(nights.uri, config.table)
    (tmp_path / "golden.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_indexed(
            store.open_version(nights.uri, None),
            promise(live),
            Gates(golden=f"{tmp_path}/golden.csv", duplicate_vectors=1),
            config,
        )
