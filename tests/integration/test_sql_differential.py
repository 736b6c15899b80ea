"""Generated queries against brute force: plain DuckDB over all rows answers the same questions (tests/sql_cases.py).

One case alone: pytest tests/integration/test_sql_differential.py -k 0137 (of the later ones: -m slow -k 1137).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import sql_cases
import sql_world
from sql_cases import Case
from sql_world import World

from conjoin.pipeline.query import Table, open_table, search

IN_CI, IN_ALL = 200, 2200
_EQUAL = 2e-6  # distances that two programs computed of the same vectors


@dataclass(slots=True)
class Bench:
    """The tables under test, the reference, and the recall of every case so far."""

    world: World
    indexed: Table
    plain: Table
    reference: duckdb.DuckDBPyConnection
    recalls: dict[int, float] = field(default_factory=dict)

    def exact(self, case: Case) -> pa.Table:
        """Without any index; the same table where SQL can be told to be exact."""
        if "exact" in inspect.signature(Table.sql).parameters:
            return self._ask(self.indexed, case, exact=True)
        return self._ask(self.plain, case)

    def default(self, case: Case) -> pa.Table:
        return self._ask(self.indexed, case)

    def _ask(self, table: Table, case: Case, **options: bool) -> pa.Table:
        sql = case.text.replace("<previous>", str(self.world.previous_number[table.uri]))
        frames = {name: self.world.frames[name] for name in case.frames}
        return table.sql(sql, case.params or None, **options, **frames).to_arrow()  # type: ignore[arg-type]

    def brute(self, case: Case) -> pa.Table:
        return self.reference.sql(case.reference, params=case.params or None).to_arrow_table()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    world = sql_world.build(tmp_path_factory.mktemp("world"))
    reference = duckdb.connect(":memory:")
    for name, rows in {"things": world.live, "things_previous": world.previous, **world.frames}.items():
        reference.register(f"__{name}", rows)
        reference.execute(f"CREATE TABLE {name} AS FROM __{name}")
    yield Bench(world, open_table(world.uri), open_table(world.plain), reference)
    reference.close()


@pytest.fixture(autouse=True)
def as_a_large_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index answers from 300 rows on: a table of this size would mostly be scanned."""
    monkeypatch.setattr(search, "_SCAN_FLOATS", 300 * sql_world.DIM)


def numbers() -> list[object]:
    """Case numbers with readable ids; all but the first ones are slow together."""
    marked = [(number, [] if number < IN_CI else [pytest.mark.slow]) for number in range(IN_ALL)]
    return [pytest.param(n, marks=marks, id=f"{n:04d}-{sql_cases.kind(n)}") for n, marks in marked]


@pytest.mark.parametrize("number", numbers())
def test_case(bench: Bench, number: int) -> None:
    case = sql_cases.case(bench.world, number)
    wanted = bench.brute(case)
    found = bench.exact(case)
    wrong = difference(case, found, wanted)
    assert not wrong, report("exact", case, wrong, found, wanted)
    found = bench.default(case)
    recall, wrong = measured(case, found, wanted)
    bench.recalls[number] = recall
    assert not wrong, report("default", case, wrong, found, wanted)
    assert recall >= 0.9, report("default", case, f"recall {recall:.2f}", found, wanted)


@pytest.mark.parametrize("numbers", [range(IN_CI), pytest.param(range(IN_CI, IN_ALL), marks=pytest.mark.slow)], ids=str)
def test_recall_on_average(bench: Bench, numbers: range) -> None:
    recalls = [recall for number, recall in bench.recalls.items() if number in numbers]
    if len(recalls) < IN_CI // 2:
        pytest.skip("the average is over all cases: run the whole file")
    assert np.mean(recalls) >= 0.99


def test_most_searches_use_the_index(bench: Bench) -> None:
    cases = [sql_cases.case(bench.world, n) for n in range(IN_CI) if sql_cases.kind(n) in ("nearest", "hidden")]
    frames = bench.world.frames
    told = [bench.indexed.explain(c.text, c.params or None, **{n: frames[n] for n in c.frames}) for c in cases]
    assert sum("index search" in text for text in told) >= len(cases) / 3


def report(way: str, case: Case, wrong: str, found: pa.Table, wanted: pa.Table) -> str:
    if case.limit is not None:
        wanted = wanted.slice(case.offset, case.limit)
    shown = {name: f"{str(value)[:60]}" for name, value in case.params.items()}
    answers = [f"{rows.num_rows} rows\n{_text(rows)}" for rows in (found, wanted)]
    return (
        f"{way}: {wrong}\n{case.text}\n{shown}\nfound: {answers[0]}\nwanted: {answers[1]}\nreference: {case.reference}\n"  # noqa: E501
        f"alone: pytest {__file__} -m 'slow or not slow' -k {case.number:04d}"
    )


def _text(rows: pa.Table) -> str:
    return "\n".join(str(row)[:300] for row in rows.slice(0, 12).to_pylist())


def difference(case: Case, found: pa.Table, wanted: pa.Table) -> str:
    """What is wrong with an exact answer, empty if nothing is."""
    if case.check != "nearest":
        return _different_rows(found, wanted, ordered=case.ordered)
    recall, wrong = measured(case, found, wanted)
    if wrong or recall < 1:
        return wrong or f"recall {recall:.3f}"
    order = wanted.slice(case.offset, case.limit)
    if case.ordered and not _near_ties(wanted, case):
        return _different_rows(found.select([case.key]), order.select([case.key]), ordered=True)
    return ""


def measured(case: Case, found: pa.Table, wanted: pa.Table) -> tuple[float, str]:
    """Recall, and what is wrong whatever the recall: rows missing, invented or out of order, wrong values."""
    if case.check == "rows":
        return 1.0, _different_rows(found, wanted, ordered=case.ordered)
    if case.check == "ids":
        return _share(found, wanted), "fewer rows" if len(_ids(found)) < len(_ids(wanted)) else ""
    expected = wanted.slice(case.offset, case.limit)
    if len(found) != len(expected):
        return 0.0, f"{len(found)} rows instead of {len(expected)}"
    places = pc.index_in(found.column(case.key), value_set=wanted.column(case.key).combine_chunks())
    if places.null_count or len(places.unique()) < len(places):
        return 0.0, "rows that are not in the table, or twice"
    same = _different_rows(found, wanted.take(places).select(found.column_names), ordered=True)
    got, best = (_distances(rows) for rows in (wanted.take(places), expected))
    if same or (np.diff(got) < -_EQUAL).any():
        return 0.0, same or "out of order"
    right = (got >= best.min(initial=9) - _EQUAL) & (got <= best.max(initial=-9) + _EQUAL)
    return float(right.mean()) if len(got) else 1.0, ""


def _distances(rows: pa.Table) -> np.ndarray:
    """(N,) float64, rows without a vector last."""
    return np.asarray(pc.fill_null(rows.column("d"), 9.0), dtype=np.float64)


def _near_ties(wanted: pa.Table, case: Case) -> bool:
    """Whether rounding decides about an order within the answer or at its ends."""
    start = max(case.offset - 1, 0)
    steps = np.diff(_distances(wanted.slice(start, case.offset - start + (case.limit or 0) + 1)))
    return bool(((steps > 0) & (steps < _EQUAL)).any())


def _ids(rows: pa.Table) -> list[object]:
    name = "id" if "id" in rows.column_names else rows.column_names[0]
    values = rows.column(name).to_pylist()
    return list(itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in values))


def _share(found: pa.Table, wanted: pa.Table) -> float:
    """Share of the wanted ids that were found; of one id as often as it is wanted."""
    from collections import Counter

    got, best = Counter(_ids(found)), Counter(_ids(wanted))
    return (got & best).total() / best.total() if best else 1.0


def _different_rows(found: pa.Table, wanted: pa.Table, *, ordered: bool) -> str:
    if found.column_names != wanted.column_names:
        return f"columns {found.column_names} instead of {wanted.column_names}"
    if len(found) != len(wanted):
        return f"{len(found)} rows instead of {len(wanted)}"
    floats = [pa.types.is_floating(field.type) for field in wanted.schema]
    rows, expected = (list(zip(*[c.to_pylist() for c in t.columns], strict=True)) for t in (found, wanted))
    if not ordered:
        rows, expected = (sorted(some, key=lambda row: _sort_key(row, floats)) for some in (rows, expected))
    for row, other in zip(rows, expected, strict=True):
        if not all(_same(*values) for values in zip(row, other, strict=True)):
            return f"{row} instead of {other}"
    return ""


def _sort_key(row: tuple[object, ...], floats: list[bool]) -> tuple[str, ...]:
    """What is no float decides; floats only where the rest is equal."""
    exact = [repr(value) for value, is_float in zip(row, floats, strict=True) if not is_float]
    return (
        *exact,
        *[f"{value:.4f}" for value, is_float in zip(row, floats, strict=True) if is_float and value is not None],
    )


def _same(value: object, other: object) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return bool(np.isclose(value, other, rtol=1e-6, atol=_EQUAL, equal_nan=True))
    return value == other
