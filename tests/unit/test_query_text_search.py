"""bm25() and hybrid() against brute force: every place in a query, filters, ties, rows that lack one side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from conjoin.pipeline import full_text, index, store
from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import Table, open_table, search, text_search

ROWS, DIM = 600, 8
WORDS = [f"w{i}" for i in range(40)]
QUERY = "W1 w2, w3"


@dataclass(frozen=True, slots=True)
class Texted:
    """A table, its texts (None: no text) and its vectors (NaN: none)."""

    table: Table
    texts: list[str | None]
    vectors: np.ndarray
    stock: np.ndarray


def texts(num: int, seed: int) -> list[str | None]:
    """Some rows without a text, some without a known word, some alike."""
    rng = np.random.default_rng(seed)
    found: list[str | None] = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(num)]
    for at in rng.choice(num, num // 10, replace=False):
        found[at] = None
    found[40:60] = ["w1 w2"] * 20
    return found


def write(make: Callable[..., Any], uri: str, num: int, **options: Any) -> Texted:
    made = make(uri, num, DIM, columns=("image_vec",), nulls=num // 10, **options)
    words = texts(num, 3)
    rows = made.rows.set_column(1, "caption", pa.array(words, pa.string()))
    rows = rows.set_column(4, "title", pa.array([f"thing {i % 7}" for i in range(num)]))
    lance.write_dataset(rows, uri, mode="overwrite", max_rows_per_file=250, data_storage_version="2.2")
    full_text.index_texts(uri, ["caption"])
    return Texted(open_table(uri, None), words, made.vectors["image_vec"], made.rows["stock"].to_numpy())


@pytest.fixture(scope="module")
def texted(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Texted:
    from conjoin.pipeline.embedder import read_spec

    uri = f"{tmp_path_factory.mktemp('texted')}/things.lance"
    return write(make_table_at, uri, ROWS, fingerprint=read_spec(tiny_encoder)[1], encoder=str(tiny_encoder))


def bm25(found: list[str | None], query: str) -> np.ndarray:
    """(N,) Okapi BM25 with Lucene's idf; 0 without a match, NaN without a text."""
    docs = [None if text is None else text.lower().replace(",", " ").split() for text in found]
    there = [doc for doc in docs if doc is not None]
    mean = sum(map(len, there)) / len(there)
    scores = np.zeros(len(found))
    for word in query.lower().replace(",", " ").split():
        df = sum(word in doc for doc in there)
        idf = math.log(1 + (len(there) - df + 0.5) / (df + 0.5))
        for at, doc in enumerate(docs):
            tf = doc.count(word) if doc else 0
            scores[at] += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(doc or []) / mean))
    return np.where([doc is None for doc in docs], np.nan, scores)


def number(row: dict[str, object]) -> int:
    return int(str(row["id"])[-6:])


@pytest.fixture
def never_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_SCAN_FLOATS", 0)


def test_scores_are_those_of_bm25(texted: Texted) -> None:
    rows = texted.table.sql(f"SELECT id, bm25(caption, '{QUERY}') AS s FROM things ORDER BY id").to_pylist()
    got = np.array([np.nan if row["s"] is None else row["s"] for row in rows], float)
    np.testing.assert_allclose(got, bm25(texted.texts, QUERY), rtol=1e-4)
    assert (got == 0).any()


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT count(*) AS n FROM things WHERE bm25(caption, Q) > 0", lambda s, p: (s > 0).sum()),
        ("SELECT count(*) AS n FROM things WHERE 0 < bm25(caption, Q) AND stock < 300",
         lambda s, p: (s[p < 300] > 0).sum()),
        ("SELECT count(*) AS n FROM things WHERE bm25(caption, Q) >= 3", lambda s, p: (s >= 3).sum()),
        ("SELECT count(*) AS n FROM things WHERE bm25(caption, Q) = 0", lambda s, p: (s == 0).sum()),
        ("SELECT count(*) AS n FROM things WHERE bm25(caption, Q) >= 0", lambda s, p: (s >= 0).sum()),
        ("SELECT count(*) AS n FROM things WHERE NOT bm25(caption, Q) > 0", lambda s, p: (s == 0).sum()),
        ("SELECT count(*) AS n FROM things WHERE bm25(caption, Q) > 0 OR stock < 9",
         lambda s, p: ((s > 0) | (p < 9)).sum()),
        ("SELECT count(*) AS n FROM things WHERE bm25(caption, Q) IS NULL", lambda s, p: np.isnan(s).sum()),
        ("SELECT count(*) AS n FROM things WHERE bm25(caption, Q) > 0 AND bm25(caption, 'w9') > 0", None),
        ("SELECT sum(bm25(caption, Q)) AS n FROM things HAVING sum(bm25(caption, Q)) > 1", lambda s, p: np.nansum(s)),
        ("SELECT count(*) AS n FROM things GROUP BY bm25(caption, Q) > 0 HAVING bm25(caption, Q) > 0",
         lambda s, p: (s > 0).sum()),
        ("SELECT count(*) AS n FROM (VALUES (1), (2)) v(x) JOIN things t ON bm25(t.caption, Q) > x", None),
        ("WITH m AS (SELECT id, bm25(caption, Q) AS s FROM things) SELECT count(*) AS n FROM m WHERE s > 2",
         lambda s, p: (s > 2).sum()),
        ("SELECT count(*) AS n FROM things a LEFT JOIN things b ON a.id = b.id AND bm25(b.caption, Q) > 0 "
         "WHERE b.id IS NOT NULL", lambda s, p: (s > 0).sum()),
    ],
)  # fmt: skip
def test_scores_stand_anywhere(texted: Texted, sql: str, expected: Callable[..., float] | None) -> None:
    scores, other = bm25(texted.texts, QUERY), bm25(texted.texts, "w9")
    wanted = {
        True: lambda: expected and expected(scores, texted.stock),
        "w9" in sql: lambda: ((scores > 0) & (other > 0)).sum(),
        "VALUES" in sql: lambda: (scores > 1).sum() + (scores > 2).sum(),
    }[True]()
    got = texted.table.sql(sql.replace("Q", f"'{QUERY}'")).to_pylist()
    assert got[0]["n"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("where", ["true", "stock < 200", "stock % 3 = 1", "bm25(caption, $q) > 0"])
@pytest.mark.parametrize(("limit", "offset"), [(5, 0), (10, 15), (1, 30), (590, 0), (0, 0)])
def test_the_best_rows_come_first_and_none_is_missing(texted: Texted, where: str, limit: int, offset: int) -> None:
    scores = bm25(texted.texts, QUERY)
    keep = {"true": scores > -1, "stock < 200": texted.stock < 200, "stock % 3 = 1": texted.stock % 3 == 1}
    kept = np.flatnonzero(keep.get(where, scores > 0) | (np.isnan(scores) & (where == "true")))
    order = sorted(kept, key=lambda at: (math.inf if np.isnan(scores[at]) else -round(scores[at], 3), at))
    sql = f"SELECT id FROM things WHERE {where} ORDER BY round(bm25(caption, $q), 3) DESC, id "
    sql += f"LIMIT {limit} OFFSET {offset}"
    plain = sql.replace("round(bm25(caption, $q), 3) DESC", "bm25(caption, $q) DESC")
    assert [number(row) for row in texted.table.sql(sql, {"q": QUERY})] == order[offset : offset + limit]
    assert [number(row) for row in texted.table.sql(plain, {"q": QUERY})] == order[offset : offset + limit]


def test_ties_at_the_last_place_follow_the_further_keys(texted: Texted) -> None:
    sql = "SELECT id FROM things WHERE stock >= 0 ORDER BY bm25(caption, 'w1 w2') DESC, id DESC LIMIT 3"
    assert "the best 3 rows" in texted.table.explain(sql)
    scores = bm25(texted.texts, "w1 w2")
    expected = sorted(range(ROWS), key=lambda at: (-round(np.nan_to_num(scores[at], nan=-1), 4), -at))[:3]
    assert [number(row) for row in texted.table.sql(sql)] == expected


def test_only_what_matches_is_read(texted: Texted) -> None:
    told = texted.table.explain("SELECT id FROM things WHERE bm25(caption, 'w1') > 0 AND stock < 9")
    assert "full-text index of caption, 'w1': matching rows only" in told
    told = texted.table.explain("SELECT id, bm25(caption, 'w1') AS s FROM things ORDER BY s DESC LIMIT 4")
    assert "full-text index of caption, 'w1': the best 4 rows" in told


def test_a_star_shows_the_columns_of_the_table_only(texted: Texted) -> None:
    found = texted.table.sql(
        "SELECT * FROM things WHERE bm25(caption, 'w1') > 0 ORDER BY bm25(caption, 'w1') DESC LIMIT 2"
    )
    assert found.columns == texted.table.schema.names
    assert texted.table.sql("SELECT bm25(caption, 'w1') FROM things LIMIT 1").columns == ["bm25"]


def test_rows_after_the_index_are_found_until_the_next_night(make_table_at: Callable[..., Any], tmp_path: Path) -> None:
    made = write(make_table_at, f"{tmp_path}/things.lance", 60)
    row = lance.dataset(made.table.uri).to_table(limit=1).set_column(0, "id", pa.array(["new"]))
    row = row.set_column(1, "caption", pa.array(["zebra"]))
    lance.write_dataset(row.cast(lance.dataset(made.table.uri).schema), made.table.uri, mode="append")
    sql = "SELECT id FROM things WHERE bm25(caption, 'zebra w1') > 0 ORDER BY bm25(caption, 'zebra') DESC LIMIT 1"
    assert made.table.sql(sql).to_pylist() == [{"id": "new"}]


def fused(texted: Texted, query: np.ndarray, words: str, keep: np.ndarray, depth: int) -> np.ndarray:
    """(N,) reciprocal rank fusion by definition; equal values have equal ranks."""
    distances = 1 - texted.vectors @ query
    distances = np.where(keep & np.isfinite(distances), distances, np.inf)
    scores = np.where(keep, np.nan_to_num(bm25(texted.texts, words)), 0)
    total = np.zeros(len(keep))
    for at in np.flatnonzero(keep):
        rank = 1 + int((distances < distances[at] - 1e-7).sum())
        total[at] += 1 / (60 + rank) if math.isfinite(distances[at]) and rank <= depth else 0
        rank = 1 + int((scores > scores[at] + 1e-4).sum())
        total[at] += 1 / (60 + rank) if scores[at] > 0 and rank <= depth else 0
    return total


@pytest.mark.usefixtures("never_scan")
@pytest.mark.parametrize("where", ["true", "stock < 200", "stock % 3 = 1", "image_vec IS NULL", "caption IS NULL"])
@pytest.mark.parametrize("depth", [5, 45, 1000])
def test_fusion_is_that_of_brute_force(texted: Texted, where: str, depth: int) -> None:
    from conjoin.pipeline.embedder import load

    column = store.vector_columns(lance.dataset(texted.table.uri))["image_vec"]
    query = load(column.encoder).encode(text=[QUERY])[0]
    null_text = np.array([text is None for text in texted.texts])
    keep = {
        "true": np.ones(ROWS, bool),
        "stock < 200": texted.stock < 200,
        "stock % 3 = 1": texted.stock % 3 == 1,
        "image_vec IS NULL": np.isnan(texted.vectors).any(axis=1),
        "caption IS NULL": null_text,
    }[where]
    expected = fused(texted, query, QUERY, keep, depth)
    sql = f"SELECT id, hybrid(image_vec, caption, $q, {depth}) AS h FROM things WHERE {where} ORDER BY h DESC LIMIT 20"
    rows = texted.table.sql(sql, {"q": QUERY}).to_pylist()
    assert len(rows) == min(20, keep.sum())
    for row, best in zip(rows, np.sort(expected[keep])[::-1], strict=False):
        assert row["h"] == pytest.approx(best, abs=1e-9)
        assert expected[number(row)] == pytest.approx(best, abs=1e-9)


@pytest.mark.usefixtures("never_scan")
def test_both_lists_are_candidates(texted: Texted) -> None:
    sql = "SELECT id FROM things ORDER BY hybrid(image_vec, caption, 'w1 w2', 10) DESC LIMIT {}"
    assert "the best 10, and as many nearest vectors" in texted.table.explain(sql.format(5))
    seen = []
    original = text_search._fused

    def spy(*args: Any) -> Any:
        found = original(*args)
        seen.append(None if found[0] is None else found[0].num_rows)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_search, "_fused", spy)
        assert len(texted.table.sql(sql.format(5))) == 5
        assert len(texted.table.sql(sql.format(ROWS))) == ROWS  # more rows than both lists: a scan
    assert seen[0] is not None
    assert 20 <= seen[0] < 100
    assert seen[1] is None


def test_a_score_beside_a_fusion_keeps_its_value(texted: Texted) -> None:
    sql = "SELECT id, bm25(caption, $q) AS s FROM things ORDER BY hybrid(image_vec, caption, $q, 3) DESC LIMIT 40"
    scores = bm25(texted.texts, QUERY)
    for row in texted.table.sql(sql, {"q": QUERY}):
        assert row["s"] == pytest.approx(scores[number(row)], rel=1e-4) or (
            row["s"] is None and np.isnan(scores[number(row)])
        )


def test_fusion_with_an_index_of_vectors(make_table_at: Callable[..., Any], tmp_path: Path, tiny_encoder: Path) -> None:
    from conjoin.pipeline.embedder import read_spec

    uri = f"{tmp_path}/things.lance"
    made = write(make_table_at, uri, 6000, fingerprint=read_spec(tiny_encoder)[1], encoder=str(tiny_encoder))
    index.build(uri, store.TableConfig(path=uri), exact_floats=10_000)
    table = open_table(uri, None)
    sql = "SELECT id, hybrid(image_vec, caption, 'w1 w2', 20) AS h FROM things ORDER BY h DESC, id LIMIT 10"
    exact = sql.replace("WHERE", "").replace("FROM things", "FROM things WHERE stock % 1 = 0")
    assert table.sql(sql).to_pylist() == table.sql(exact).to_pylist()
    assert made.table.uri == uri


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT bm25(title, 'x') FROM things",
         r"title of things has no full-text index.*table.full_text: \[caption, title\]"),
        ("SELECT bm25(caption) FROM things", "takes a text column and words"),
        ("SELECT bm25(caption, title) FROM things", "one literal or parameter"),
        ("SELECT bm25('a', 'b') FROM things", "not a column that can be traced"),
        ("SELECT bm25(c, 'b') FROM (SELECT caption AS c FROM things)", "needs the table itself.*Compute it inside"),
        ("SELECT bm25(x, 'b') FROM frame", "frame is a frame"),
        ("SELECT hybrid(image_vec, caption) FROM things", "hybrid.. takes a vector column"),
        ("SELECT hybrid(image_vec, caption, 'w1', 0) FROM things", "whole number above 0"),
        ("SELECT id FROM things WHERE hybrid(image_vec, caption, 'w1') > 0", "ranks the rows that WHERE leaves"),
        ("SELECT max(hybrid(image_vec, caption, 'w1')) FROM things", "ranks the rows that WHERE leaves"),
        ("SELECT hybrid(image_vec, caption, 'w1') FROM things JOIN frame ON true", "ranks the rows of one table"),
        ("SELECT hybrid(price, caption, 'w1') FROM things", "not a vector column"),
        ("SELECT bn25(caption, 'w1') FROM things", "no function bn25.*did you mean 'bm25'"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored(texted: Texted, sql: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        texted.table.sql(sql, frame=pa.table({"x": ["a"]}))


@pytest.mark.parametrize("words", ["", "  ", "'", "; drop", "w1 AND w2", "caption:w1", '"w1 w2"', "w1*", "\0"])
def test_words_are_words_whatever_they_hold(texted: Texted, words: str) -> None:
    sql = "SELECT count(*) AS n FROM things WHERE bm25(caption, $q) > 0"
    known = set("".join(c if c.isalnum() else " " for c in words.lower()).split())
    expected = sum(bool(known & set((text or "").split())) for text in texted.texts)
    assert texted.table.sql(sql, {"q": words}).to_pylist() == [{"n": expected}]


WORDY = {
    "text": "SELECT id, distance(image_vec, text($w)) AS d FROM things ORDER BY d, id LIMIT 7",
    "bm25": "SELECT id, bm25(caption, $w) AS s FROM things WHERE bm25(caption, $w) > 0 ORDER BY s DESC, id LIMIT 7",
    "scores": "SELECT id, bm25(caption, $w) AS s, bm25(caption, 'w1 w2') AS own FROM things ORDER BY id",
    "hybrid": "SELECT id, hybrid(image_vec, caption, $w) AS s FROM things ORDER BY s DESC, id LIMIT 7",
    "named by its words": "SELECT id, 1 - bm25(caption, $w) FROM things ORDER BY id LIMIT 7",
    "also a value": "SELECT id, $w AS said, bm25(caption, $w) AS s FROM things ORDER BY id LIMIT 7",
    "two": "SELECT id, bm25(caption, $w) AS s, bm25(caption, $x) AS t FROM things ORDER BY id",
}


@pytest.mark.parametrize("asked", WORDY)
def test_a_plan_serves_other_words(texted: Texted, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from conjoin.pipeline.query import table

    sql, opened, planned = WORDY[asked], open_table(texted.table.uri, None), []
    original = table.prepare
    monkeypatch.setattr(table, "prepare", lambda *given: planned.append(given) or original(*given))
    words = ["w1 w2", "W3", "w1 w2", 'it\'s w4 "quoted"', "nothing", "w3"]
    for w, x in zip(words, [*words[1:], "w3"], strict=True):
        params = {"w": w, "x": x} if "$x" in sql else {"w": w}
        before = len(planned)
        found = opened.sql(sql, params)
        anew = len(planned) - before
        wanted = open_table(texted.table.uri, None).sql(sql, params)
        assert found.to_pylist() == wanted.to_pylist()
        assert anew == 0 or asked in ("also a value", "two") or w == words[0]


def test_threads_that_ask_one_plan_have_their_own_words(texted: Texted) -> None:
    from concurrent.futures import ThreadPoolExecutor

    opened, words = open_table(texted.table.uri, None), [f"w{i % 40}" for i in range(48)]
    wanted = [open_table(texted.table.uri, None).sql(WORDY["bm25"], {"w": w}).to_pylist() for w in words[:40]]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda w: opened.sql(WORDY["bm25"], {"w": w}).to_pylist(), words))
    assert found == [*wanted, *wanted[:8]]
