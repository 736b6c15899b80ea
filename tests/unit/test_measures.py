"""What is kept of a version's vectors against everything computed anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline import answers, measures, storage, store
from conjoin.pipeline.answers import KEPT, Answers, K, unanswered
from conjoin.pipeline.errors import StorageError

FINGERPRINT = "0123456789abcdef0123456789abcdef"


def exact(dataset: Any, name: str, queries_QD: np.ndarray) -> np.ndarray:
    """(Q,) the cosine of the tenth nearest row, by a loop over everything."""
    vectors = [row for row in dataset.to_table(columns=[name])[name].to_pylist() if row is not None]
    return np.sort(queries_QD @ np.array(vectors, np.float32).T, axis=1)[:, -K]


def check(dataset: Any, found: measures.Measures) -> None:
    """Counts, sums and answers are those of the table."""
    assert found.num_rows == dataset.count_rows()
    for name, column in store.vector_columns(dataset).items():
        kept = found.of(column)
        assert kept is not None
        rows = dataset.to_table(columns=["id", name], filter=f"{name} IS NOT NULL")
        vectors = np.array(rows[name].to_pylist(), np.float32).astype(np.float64)
        assert kept.count == len(vectors)
        np.testing.assert_allclose(kept.sum_D, vectors.sum(axis=0), atol=1e-4)
        np.testing.assert_allclose(kept.answers.kth, exact(dataset, name, kept.answers.queries_QD), atol=1e-5)
        by_id = dict(zip(rows["id"].to_pylist(), vectors, strict=True))
        for query, names, cosines in zip(
            kept.answers.queries_QD, kept.answers.ids_QK, kept.answers.similarities_QK, strict=True
        ):
            listed = [name for name in names if name is not None]
            assert len(set(listed)) == len(listed)
            np.testing.assert_allclose([by_id[name] @ query for name in listed], cosines[: len(listed)], atol=1e-5)


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on nothing may read a whole column."""

    def forbid() -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("a whole column was read")

        monkeypatch.setattr(measures, "_batches", refuse)

    return forbid


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"nulls": 150}], ids=["plain", "float16", "nulls"])
def test_a_first_night_is_measured_whole(make_table: Callable[..., Any], nights: Any, options: dict[str, Any]) -> None:
    dataset = nights.first(make_table(400, dim=8, **options).rows)
    check(dataset, measures.measure(dataset))


def test_integer_ids(make_table: Callable[..., Any], nights: Any) -> None:
    rows = make_table(100, dim=8).rows
    dataset = nights.first(rows.set_column(0, "id", pa.array(range(100), pa.int64())))
    check(dataset, measures.measure(dataset))
    after = nights.next("r2", delete=[3, 4, 5])
    check(after, measures.measure(after, dataset))


def test_a_night_reads_only_what_changed(
    make_table: Callable[..., Any], nights: Any, tmp_path: Any, no_pass: Callable[[], None]
) -> None:
    rows = make_table(600, dim=8).rows
    live = nights.first(rows)
    measures.measure(live)
    no_pass()
    gone = rows["id"].to_pylist()[10:40:3]
    new = make_table(30, dim=8, seed=7, uri=f"{tmp_path}/new.lance").rows
    after = nights.next("r2", delete=gone, insert=new, detached=True)
    check(after, measures.measure(after, live))
    head = nights.next("r2", delete=gone, insert=new)
    check(head, measures.measure(head))  # kept for the run: not even the difference is looked at


def test_a_vector_column_written_anew_in_some_fragments(
    make_table: Callable[..., Any], nights: Any, tmp_path: Any, no_pass: Callable[[], None]
) -> None:
    rows = make_table(600, dim=8).rows
    live = nights.first(rows, fragments=6)
    measures.measure(live)
    no_pass()
    other = make_table(20, dim=8, seed=3, uri=f"{tmp_path}/new.lance").rows
    columns = pa.table([rows["id"][:20], other["image_vec"]], names=["id", "image_vec"])
    after = nights.next("r2", columns=columns, delete=[rows["id"][5].as_py()])
    check(after, measures.measure(after, live))


def test_prices_do_not_touch_what_is_known(
    make_table: Callable[..., Any], nights: Any, no_pass: Callable[[], None]
) -> None:
    rows = make_table(300, dim=8).rows
    live = nights.first(rows)
    before = measures.measure(live)
    no_pass()
    after = nights.next("r2", columns=pa.table({"id": rows["id"][:200], "price": [1.5] * 200}))
    found = measures.measure(after, live)
    check(after, found)
    column = store.vector_columns(after)["image_vec"]
    old, new = before.of(column), found.of(column)
    assert old is not None
    assert new is not None
    assert (new.arrivals.seen, old.arrivals.seen) == (0, 300)


def test_queries_that_know_too_few_rows_are_asked_again(
    make_table: Callable[..., Any], nights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_table(600, dim=8, columns=("image_vec",)).rows
    live = nights.first(rows)
    column = store.vector_columns(live)["image_vec"]
    kept = measures.measure(live).of(column)
    assert kept is not None
    asked: list[int] = []
    original = measures._answered

    def answered(dataset: Any, column: Any, questions: Answers) -> Answers:
        asked.append(len(questions))
        return original(dataset, column, questions)

    monkeypatch.setattr(measures, "_answered", answered)
    after = nights.next("r2", delete=list(kept.answers.ids_QK[0, : KEPT - K + 1]))
    check(after, measures.measure(after, live))
    assert len(asked) == 1
    assert 1 <= asked[0] < len(kept.answers)


def test_versions_that_index_compact_or_rename_share_what_their_run_kept(
    make_table: Callable[..., Any], nights: Any, no_pass: Callable[[], None]
) -> None:
    live = nights.first(make_table(300, dim=8).rows)
    measures.measure(live)
    no_pass()
    live.create_scalar_index("id", "BTREE", name="id_idx")
    lance.dataset(nights.uri).optimize.compact_files()
    lance.dataset(nights.uri).alter_columns({"path": "image_vec", "name": "image_vec__next"})
    dataset = lance.dataset(nights.uri)
    check(dataset, measures.measure(dataset))


def test_another_encoder_is_measured_whole_beside_the_old_one(
    make_table: Callable[..., Any], nights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_table(200, dim=8, columns=("image_vec",)).rows
    live = nights.first(rows)
    measures.measure(live)
    metadata = {**rows.schema.field("image_vec").metadata, b"conjoin:fingerprint": b"f" * 32}
    live.add_columns(pa.schema([pa.field("image_vec__next", pa.list_(pa.float32(), 8), metadata=metadata)]))
    columns = pa.table([rows["id"], rows["image_vec"]], names=["id", "image_vec__next"])
    after = nights.next("r2", columns=columns)
    passes: list[str] = []
    whole = measures._whole
    monkeypatch.setattr(measures, "_whole", lambda d, column: (passes.append(column.name), whole(d, column))[1])
    check(after, measures.measure(after, live))
    assert passes == ["image_vec__next"]


def test_broken_vectors_are_counted_and_do_not_spoil_sums(make_table: Callable[..., Any], nights: Any) -> None:
    rows = make_table(100, dim=8, columns=("image_vec",)).rows
    vectors = np.array(rows["image_vec"].to_pylist(), np.float32)
    vectors[3], vectors[4, 0], vectors[5] = np.nan, np.inf, vectors[5] * 2
    position = rows.schema.get_field_index("image_vec")
    array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 8)
    dataset = nights.first(rows.set_column(position, rows.schema.field(position), array))
    kept = measures.measure(dataset).of(store.vector_columns(dataset)["image_vec"])
    assert kept is not None
    assert kept.arrivals == measures.Arrivals(100, 2, 1)
    assert np.isfinite(kept.sum_D).all()
    assert np.isfinite(kept.answers.similarities_QK).all()


def test_rows_that_went_without_a_run_make_what_is_kept_worthless(make_table: Callable[..., Any], nights: Any) -> None:
    live = nights.first(make_table(200, dim=8).rows)
    measures.measure(live)
    lance.dataset(nights.uri).delete("stock < 3")
    head = lance.dataset(nights.uri)
    assert measures.known(head) is None
    check(head, measures.measure(head))


def test_forgetting(make_table: Callable[..., Any], nights: Any) -> None:
    live = nights.first(make_table(50, dim=8).rows)
    measures.measure(live)
    assert measures.known(live) is not None
    assert measures.drop(nights.uri) == 1
    assert measures.known(live) is None
    assert measures.drop(nights.uri) == 0


def test_a_newer_format_is_refused_by_name(make_table: Callable[..., Any], nights: Any) -> None:
    live = nights.first(make_table(50, dim=8).rows)
    measures.measure(live)
    path = f"{store.bookkeeping(nights.uri)}/state/r1/measures.parquet"
    table = pq.read_table(path)
    about = {**json.loads(table.schema.metadata[b"conjoin"]), "format": storage.FORMAT + 1}
    pq.write_table(table.replace_schema_metadata({b"conjoin": json.dumps(about)}), path)
    with pytest.raises(StorageError, match="newer conjoin"):
        measures.measure(live)


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_right_after_any_rows_came_and_went(seed: int) -> None:
    """Against sorting all rows; a query that says it is short is asked again, no other has to be."""
    rng = np.random.default_rng(seed)

    def unit(count: int) -> np.ndarray:
        found = rng.normal(size=(count, 4)).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    there: dict[int, np.ndarray] = {}
    kept, number = unanswered(unit(5), ["text"] * 2 + ["image"] * 3), 0
    for _ in range(40):
        if rng.random() < 0.5:
            vectors = unit(int(rng.integers(1, 90)))
            ids = pa.array(range(number, number + len(vectors)), pa.int64())
            there |= dict(zip(ids.to_pylist(), vectors, strict=True))
            kept, number = kept.with_rows(ids, vectors), number + len(vectors)
        elif there:
            gone = rng.choice(list(there), min(len(there), int(rng.integers(1, 90))), replace=False).tolist()
            kept = kept.without(pa.array(gone, pa.int64()))
            there = {key: value for key, value in there.items() if key not in set(gone)}
        if kept.short.any():
            again = kept.forgotten(kept.short)
            if there:
                again = again.with_rows(pa.array(list(there), pa.int64()), np.array(list(there.values())))
            kept = kept.replaced(kept.short, again)
        every = np.sort(kept.queries_QD @ np.array(list(there.values()) or np.zeros((0, 4))).T, axis=1)[:, ::-1]
        wanted = np.full((5, K), answers.NOTHING, np.float32)
        wanted[:, : min(K, len(there))] = every[:, :K]
        np.testing.assert_allclose(kept.similarities_QK[:, :K], wanted, atol=1e-5)
    assert [(group.start, group.stop) for group in kept.groups] == [(0, 2), (2, 5)]


def test_questions_lean_towards_another_row_each() -> None:
    rng = np.random.default_rng(0)
    vectors_QD = rng.normal(size=(50, 16)).astype(np.float32)
    others_QD = (measures.leaning(vectors_QD, rng) - 0.7 * vectors_QD) / 0.3
    found_Q = np.linalg.norm(others_QD[:, None] - vectors_QD[None], axis=2).argmin(axis=1)
    np.testing.assert_allclose(others_QD, vectors_QD[found_Q], atol=1e-5)
    assert sorted(found_Q) == list(range(50))
    assert (found_Q != np.arange(50)).all()
