"""Every gate on data made to fail it, beside data that passes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from gated import COLUMNS, build, by_name, catalog, expected

from conjoin.pipeline import index, measures, sample, source, store
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.errors import GateError
from conjoin.pipeline.gates import GateResult, Gates, check_gates, check_indexed


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure of recall is looked at closely."""
    monkeypatch.setattr(measures, "QUERIES", 12)


def passes(dataset: lance.LanceDataset, num_rows: int, **changes: float) -> tuple[GateResult, ...]:
    return check_gates(dataset, expected(num_rows), Gates(**changes))


def with_vectors(rows: pa.Table, column: str, change: Callable[[np.ndarray], np.ndarray]) -> pa.Table:
    """The same rows with other vectors in one column."""
    kind = rows.schema.field(column).type
    dtype = kind.value_type.to_pandas_dtype()
    values = change(np.array(rows[column].to_pylist(), dtype))
    array = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel().astype(dtype), kind.value_type), kind.list_size)
    position = rows.schema.get_field_index(column)
    return rows.set_column(position, rows.schema.field(position), array)


def written(path: Path, rows: pa.Table) -> lance.LanceDataset:
    return lance.write_dataset(rows, f"{path}/c.lance")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("nulls", [0, 50, 20])
def test_good_versions_pass(make_table: Callable[..., Any], dtype: str, nulls: int) -> None:
    made = make_table(50, dim=16, dtype=dtype, nulls=nulls)
    results = passes(store.open_version(made.uri), 50)
    per_column = ("encoder", "dimension", "vectors", "duplicate vectors")
    assert {result.name for result in results} == {"rows", "ids", "quarantine", "columns"} | {
        f"{gate} of {column}" for gate in per_column for column in COLUMNS
    }


def set_row(row: int, value: object) -> Callable[[np.ndarray], np.ndarray]:
    def change(vectors: np.ndarray) -> np.ndarray:
        vectors[row] = value
        return vectors

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_row(3, np.nan), "image_vec: 1 not finite and 0 not of unit length"),
        (set_row(3, np.inf), "image_vec: 1 not finite"),
        (set_row(3, 0), "0 not finite and 1 not of unit length"),
        (lambda vectors: vectors * 1.01, "0 not finite and 40 not of unit length, of 40"),
        (lambda vectors: np.repeat(vectors[:1], len(vectors), axis=0), r"100.0% share their vector"),
    ],
    ids=["nan", "infinity", "zero", "norm", "collapse"],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_broken_vectors_are_stopped(
    make_table: Callable[..., Any],
    tmp_path: Path,
    dtype: str,
    change: Callable[[np.ndarray], np.ndarray],
    message: str,
) -> None:
    dataset = written(tmp_path, with_vectors(make_table(40, dim=8, dtype=dtype).rows, "image_vec", change))
    with pytest.raises(GateError, match=message):
        passes(dataset, 40)


def test_equal_contents_may_share_a_vector(make_table: Callable[..., Any], tmp_path: Path) -> None:
    rows = make_table(40, dim=8).rows
    hashes = pa.array([bytes(16)] * 40, pa.binary(16))
    same = rows.set_column(rows.schema.get_field_index("image_hash"), "image_hash", hashes)
    dataset = written(tmp_path, with_vectors(same, "image_vec", lambda vectors: np.repeat(vectors[:1], 40, axis=0)))
    assert passes(dataset, 40)


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (set_row(3, np.nan), "vectors of image_vec: image_vec: 1 not finite and 0 not of unit length, of 40 new ones"),
        (lambda vectors: np.repeat(vectors[:1], len(vectors), axis=0), "duplicate vectors of image_vec"),
    ],
    ids=["nan", "collapse"],
)
def test_what_came_tonight_is_looked_at_among_many_old_rows(
    make_table: Callable[..., Any], nights: Any, tmp_path: Path, change: Any, gate: str
) -> None:
    live = nights.first(make_table(900, dim=8).rows)
    measures.measure(live)
    new = with_vectors(make_table(40, dim=8, seed=5, uri=f"{tmp_path}/new.lance").rows, "image_vec", change)
    candidate = nights.next("r2", insert=new, detached=True)
    with pytest.raises(GateError, match=gate):
        check_gates(candidate, expected(940), Gates(duplicate_vectors=0.01), live)


def test_every_failed_gate_is_named_with_its_numbers_and_all_results_are_attached(
    make_table: Callable[..., Any],
) -> None:
    dataset = store.open_version(make_table(40, dim=4).uri)
    with pytest.raises(GateError) as error:
        check_gates(dataset, expected(41, "f" * 32, ("image_vec",)), Gates())
    for words in ("40 rows, the plan has 41", "encoder 0123456789ab, expected ffffffffffff", "image_vec, text_vec"):
        assert words in error.value.what
    assert "Nothing was published" in error.value.next
    results = by_name(pickle.loads(pickle.dumps(error.value)).results)
    assert (results["rows"].passed, results["ids"].passed) == (False, True)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_repeated_ids_are_stopped(make_table: Callable[..., Any]) -> None:
    made = make_table(10, dim=4)
    make_table(5, dim=4, mode="append")
    with pytest.raises(GateError, match="ids: 5 repeated, 0 null and 0 lost ids, of 15 looked at"):
        passes(store.open_version(made.uri, None), 15)


def test_repeated_ids_of_a_large_table_are_found_through_the_index(
    make_table: Callable[..., Any], nights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_table(300, dim=8).rows
    live = nights.first(rows)
    live.create_scalar_index("id", "BTREE", name="id_idx")
    live = nights.publish()
    monkeypatch.setattr(sample, "SAMPLE", 100)
    candidate = nights.next("r2", insert=rows.slice(7, 3), detached=True)
    with pytest.raises(GateError, match="ids: 3 repeated, 0 null and 0 lost ids, of 3 looked at"):
        check_gates(candidate, expected(303), Gates(), live)
    assert "ScalarIndex" in candidate.scanner(columns=["id"], filter="id IN ('a', 'b')").explain_plan()
    moved = nights.next("r2", delete=rows["id"].to_pylist()[7:10], insert=rows.slice(7, 3), detached=True)
    assert "of 3 looked at" in by_name(check_gates(moved, expected(300), Gates(), live))["ids"].detail


@pytest.mark.parametrize(
    ("num_rows", "allowed", "fits"), [(105, 0.05, True), (95, 0.05, True), (106, 0.05, False), (94, 0.05, False)]
)
def test_row_change_against_live(
    make_table: Callable[..., Any], tmp_path: Path, num_rows: int, allowed: float, fits: bool
) -> None:
    before = store.open_version(make_table(100, dim=4).uri)
    after = store.open_version(make_table(num_rows, dim=4, uri=f"{tmp_path}/after.lance").uri)
    limits = Gates(row_change=allowed, hit_at_10_drop=1)
    if fits:
        assert check_gates(after, expected(num_rows), limits, before)
    else:
        with pytest.raises(GateError, match=f"100 -> {num_rows} rows is a change of 6.0%, allowed are 5.0%"):
            check_gates(after, expected(num_rows), limits, before)


@pytest.mark.parametrize(("added", "deleted", "fits"), [(5, 3, True), (5, 2, False), (4, 3, False)])
def test_rows_are_conserved(
    make_table: Callable[..., Any], nights: Any, tmp_path: Path, added: int, deleted: int, fits: bool
) -> None:
    rows = make_table(200, dim=8).rows
    live = nights.first(rows)
    new = make_table(5, dim=8, seed=2, uri=f"{tmp_path}/new.lance").rows
    candidate = nights.next("r2", delete=rows["id"].to_pylist()[:3], insert=new, detached=True)
    promise = replace(expected(202), added=added, deleted=deleted)
    if fits:
        assert by_name(check_gates(candidate, promise, Gates(), live))["rows conserved"].passed
    else:
        with pytest.raises(GateError, match=f"200 rows in live \\+ {added} added - {deleted} deleted = "):
            check_gates(candidate, promise, Gates(), live)


def test_too_many_in_quarantine(make_table: Callable[..., Any]) -> None:
    dataset = store.open_version(make_table(100, dim=4).uri)
    with pytest.raises(GateError, match=r"2 of 100 records have a value in quarantine, 2.00%, allowed 1.00%"):
        check_gates(dataset, replace(expected(100), quarantined=2), Gates())
    assert check_gates(dataset, replace(expected(100), quarantined=1), Gates())


def test_a_vector_column_of_somebody_else(make_table: Callable[..., Any], tmp_path: Path) -> None:
    rows = make_table(20, dim=4).rows
    foreign = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(40, np.float32)), 2)
    with pytest.raises(GateError, match="unknown vectors: no encoder's fingerprint is on mine"):
        passes(written(tmp_path, rows.append_column("mine", foreign)), 20)


def test_a_vector_column_that_is_missing(make_table: Callable[..., Any], tmp_path: Path) -> None:
    rows = make_table(20, dim=4).rows
    with pytest.raises(GateError, match="columns: vector columns are image_vec, planned are image_vec, text_vec"):
        passes(written(tmp_path, rows.drop_columns("text_vec")), 20)


def test_vectors_of_another_encoder(make_table: Callable[..., Any]) -> None:
    dataset = store.open_version(make_table(20, dim=4).uri)
    with pytest.raises(GateError, match="encoder of image_vec: image_vec: encoder 0123456789ab, expected ffffffffffff"):
        check_gates(dataset, expected(20, "f" * 32), Gates())


def test_a_wrong_dimension(make_table: Callable[..., Any], tmp_path: Path) -> None:
    rows = make_table(20, dim=4).rows
    position = rows.schema.get_field_index("image_vec")
    field = rows.schema.field("image_vec")
    wrong = field.with_metadata({**field.metadata, b"conjoin:dim": b"5"})
    with pytest.raises(GateError, match="image_vec: 4 dimensions, its metadata says 5"):
        passes(written(tmp_path, rows.set_column(position, wrong, rows["image_vec"])), 20)


def test_a_moved_centroid(make_table: Callable[..., Any], nights: Any, tmp_path: Path) -> None:
    live = nights.first(make_table(300, dim=8).rows)
    measures.measure(live)
    new = make_table(60, dim=8, seed=5, uri=f"{tmp_path}/new.lance").rows
    rng = np.random.default_rng(0)

    def elsewhere(vectors: np.ndarray) -> np.ndarray:
        before = measures.measure(live).of(store.vector_columns(live)["image_vec"])
        assert before is not None
        across = np.linalg.svd(before.sum_D[None])[2][1]
        moved = across + 0.1 * rng.normal(size=vectors.shape)
        return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True))

    limits = Gates(row_change=1)
    good = nights.next("r2", insert=new, detached=True)
    shifts = by_name(check_gates(good, expected(360), limits, live))
    assert (shifts["centroid of image_vec"].value or 0) < 0.05
    bad = nights.next("r3", insert=with_vectors(new, "image_vec", elsewhere), detached=True)
    with pytest.raises(GateError, match=r"centroid of image_vec: image_vec: the mean vector moved by [01]\."):
        check_gates(bad, expected(360), limits, live)


def paired(rows: pa.Table) -> pa.Table:
    """Texts that lie near their pictures."""
    rng = np.random.default_rng(1)

    def near(vectors: np.ndarray) -> np.ndarray:
        images = np.array(rows["image_vec"].to_pylist(), np.float32)
        moved = images + 0.05 * rng.normal(size=images.shape)
        return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True))

    return with_vectors(rows, "text_vec", near)


def test_records_that_are_not_found_any_more(make_table: Callable[..., Any], nights: Any) -> None:
    rows = paired(make_table(400, dim=16).rows)
    live = nights.first(rows)
    mixed = rows.slice(0, 60).select(["id", "text_vec"])
    turned = mixed.set_column(1, mixed.schema.field(1), mixed["text_vec"].take(pa.array(np.roll(np.arange(60), 7))))
    bad = nights.next("r2", columns=turned, detached=True)
    with pytest.raises(GateError, match=r"hit@10 text to image: text finds its image among 400 for 8\d"):
        check_gates(bad, expected(400), Gates(), live)
    results = by_name(check_gates(bad, expected(400), Gates(hit_at_10_drop=0.5), live))
    assert results["hit@10 text to image"].value == pytest.approx(0.87, abs=0.05)
    good = nights.next("r3", columns=rows.slice(0, 60).select(["id", "text_vec"]), detached=True)
    assert by_name(check_gates(good, expected(400), Gates(), live))["hit@10 image to text"].passed


def test_a_new_encoder_is_compared_with_the_one_it_replaces(make_table: Callable[..., Any], nights: Any) -> None:
    rows = paired(make_table(300, dim=16).rows)
    live = nights.first(rows)
    fields = [
        pa.field(f"{n}__next", f.type, metadata={**f.metadata, b"conjoin:fingerprint": b"f" * 32})
        for n, f in ((n, rows.schema.field(n)) for n in COLUMNS)
    ]
    lance.dataset(nights.uri).add_columns(pa.schema(fields))
    order = pa.array(np.roll(np.arange(300), 11))

    def filled(text: pa.ChunkedArray, run: str) -> Any:
        columns = pa.table([rows["id"], rows["image_vec"], text], names=["id", "image_vec__next", "text_vec__next"])
        return nights.next(run, columns=columns, detached=True)

    good = check_gates(filled(rows["text_vec"], "r2"), expected(300, "f" * 32), Gates(), live)
    assert {"encoder of image_vec__next", "vectors of text_vec__next"} <= by_name(good).keys()
    with pytest.raises(GateError, match="hit@10 text to image") as error:
        check_gates(filled(rows["text_vec"].take(order), "r3"), expected(300, "f" * 32), Gates(), live)
    assert "centroid" not in error.value.what


def test_held_out_records_are_those_of_the_split(make_table: Callable[..., Any], nights: Any) -> None:
    live = nights.first(paired(make_table(500, dim=16).rows))
    config = catalog(nights.uri, split=source.Split(validation=0.2))
    results = by_name(check_gates(nights.next("r2", detached=True), expected(500), Gates(), live, config))
    ids = live.to_table(columns=["id"])["id"]
    held_out = int((source.split_of(ids, config.source.split) == "validation").sum())
    assert f"of {held_out} held-out records" in results["hit@10 text to image"].detail


def test_an_indexed_head_passes_and_the_candidate_is_not_repeated(
    make_table: Callable[..., Any], nights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = paired(make_table(600, dim=8).rows)
    nights.first(rows)
    build(nights.uri)
    live = nights.publish()
    gone = rows["id"].to_pylist()[:5]
    earlier = check_gates(nights.next("r2", delete=gone, detached=True), expected(595), Gates(), live)
    nights.next("r2", delete=gone)
    head = build(nights.uri)
    config = catalog(nights.uri)
    whole = by_name(check_indexed(head, expected(595), Gates(), low(config), live))
    assert {"index complete", "recall of image_vec", "names", "commits", "hit@10 text to image"} <= whole.keys()
    monkeypatch.setattr("conjoin.pipeline.quality.vector_gates", lambda subject: pytest.fail("repeated"))
    assert by_name(check_indexed(head, expected(595), Gates(), low(config), live, earlier)).keys() == whole.keys()


def low(config: Catalog) -> Catalog:
    return replace(config, table=config.table.model_copy(update={"ann_recall": 0.9}))


def test_rows_without_an_index(make_table: Callable[..., Any], nights: Any, tmp_path: Path) -> None:
    nights.first(make_table(600, dim=8).rows)
    live = build(nights.uri)
    nights.next("r2", insert=make_table(20, dim=8, seed=4, uri=f"{tmp_path}/new.lance").rows)
    head = store.open_version(nights.uri, None)
    with pytest.raises(GateError, match="index complete: 20 rows are not in id_idx, 20 rows are not in image_vec_idx"):
        check_indexed(head, expected(620), Gates(), low(catalog(nights.uri)), live)


def test_no_index_at_all(make_table: Callable[..., Any], nights: Any) -> None:
    head = nights.first(make_table(100, dim=8).rows)
    with pytest.raises(GateError, match="index complete: 100 rows are not in id"):
        check_indexed(head, expected(100), Gates(), catalog(nights.uri))


def test_recall_below_the_target(make_table: Callable[..., Any], nights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an index that somebody else built, asked with too few probes; then of what was measured for this version."""
    nights.first(make_table(2000, dim=32, columns=("image_vec",)).rows)
    dataset, promise = lance.dataset(nights.uri), expected(2000, columns=("image_vec",))
    dataset.create_scalar_index("id", "BTREE", name="id_idx")
    dataset.create_index("image_vec", "IVF_FLAT", metric="cosine", num_partitions=64)
    monkeypatch.setattr(index, "_UNMEASURED", (1, 1))
    with pytest.raises(GateError, match=r"recall of image_vec: image_vec: recall@10 is 0\.\d+ against exact search"):
        check_indexed(lance.dataset(nights.uri), promise, Gates(), catalog(nights.uri))
    head = build(nights.uri)
    assert check_indexed(head, promise, Gates(), low(catalog(nights.uri)))
    strict = replace(catalog(nights.uri), table=store.TableConfig(path=nights.uri, ann_recall=1.0))
    with pytest.raises(GateError, match=r"recall@10 is 0\.9\d+ against exact search, table.ann_recall is 1.0"):
        check_indexed(head, promise, Gates(), strict)


def test_a_column_that_was_not_renamed(make_table: Callable[..., Any], nights: Any) -> None:
    nights.first(make_table(100, dim=8).rows)
    lance.dataset(nights.uri).alter_columns({"path": "image_vec", "name": "image_vec__next"})
    head = build(nights.uri)
    with pytest.raises(GateError, match="names: image_vec__next should have replaced the old column"):
        check_indexed(head, expected(100), Gates(), low(catalog(nights.uri)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_rows_that_somebody_else_added(make_table: Callable[..., Any], nights: Any, tmp_path: Path, when: str) -> None:
    """A plain `add` of foreign vectors of the right shape while the night worked: nothing else would tell."""
    nights.first(make_table(100, dim=8).rows)
    live = nights.publish()
    foreign = make_table(10, dim=8, seed=8, uri=f"{tmp_path}/new.lance").rows
    if when == "before":
        lance.write_dataset(foreign, nights.uri, mode="append")
    nights.next("r2", delete=["row-0-000001"])
    if when == "after":
        lance.write_dataset(foreign, nights.uri, mode="append")
    head = build(nights.uri)
    with pytest.raises(GateError, match=r"commits: 1 commits since live are not conjoin's: version \d+, Append"):
        check_indexed(head, expected(109), Gates(row_change=1), low(catalog(nights.uri)), live)


def test_commits_of_upkeep_are_nobody_elses(make_table: Callable[..., Any], nights: Any) -> None:
    nights.first(make_table(100, dim=8).rows)
    live = nights.publish()
    nights.next("r2", delete=["row-0-000001"])
    lance.dataset(nights.uri).optimize.compact_files()
    lance.dataset(nights.uri).add_columns(pa.schema([pa.field("later", pa.int32())]))
    lance.dataset(nights.uri).drop_columns(["later"])
    head = build(nights.uri)
    found = by_name(check_indexed(head, expected(99), Gates(), low(catalog(nights.uri)), live))
    assert found["commits"].detail == "0 commits since live are not conjoin's"


def bytes_read(make_table: Callable[..., Any], nights: Any, num_rows: int) -> int:
    """By all gates of a candidate, in a table of two vector columns of 32 dimensions."""
    nights.first(paired(make_table(num_rows, dim=32, uri=f"{nights.uri}.rows").rows), fragments=8)
    lance.dataset(nights.uri).create_scalar_index("id", "BTREE", name="id_idx")
    measures.measure(nights.publish())
    new = make_table(20, dim=32, seed=3, uri=f"{nights.uri}.new").rows
    nights.next("r2", delete=[f"row-0-{number * 400:06d}" for number in range(20)], insert=new)
    live, candidate = store.open_version(nights.uri), lance.dataset(nights.uri)
    for dataset in (live, candidate):
        dataset.io_stats_incremental()
    results = by_name(check_gates(candidate, expected(num_rows), Gates(), live, catalog(nights.uri)))
    assert {"hit@10 text to image", "centroid of image_vec", "ids"} <= results.keys()
    return sum(dataset.io_stats_incremental().read_bytes for dataset in (live, candidate))


def test_no_gate_scans_the_table(make_table: Callable[..., Any], nights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates of a night of 20 rows read as many bytes of a table of 40,000 rows as of one of 10,000."""
    monkeypatch.setattr(sample, "SAMPLE", 1000)
    read = [
        bytes_read(make_table, replace(nights, uri=f"{nights.uri}.{number}"), number) for number in (10_000, 40_000)
    ]
    assert 0 < read[1] < 1.3 * read[0]


# What follows asks the source and a real encoder.
