"""Generated queries over the table of sql_world.py, and the same questions as plain DuckDB over all of its rows.

Assumes: a case depends on its number alone, so that one can be run again. The reference is made from the text of the
query by replacing our functions with array_cosine_distance: nothing of our parser or planner takes part in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import sql_world
from sql_world import DIM, World

# rows: all answers are the same rows. nearest: a top-k; the reference is the whole order. ids: rows that depend on a
# top-k somewhere inside, measured by the ids among them.
Check = Literal["rows", "nearest", "ids"]
_GAP = 2e-6  # thresholds keep clear of distances, which differ by rounding


@dataclass(frozen=True, slots=True)
class Case:
    """One question. sql: ours, without LIMIT where `limit` is given; ordered: rows have one right order.

    hidden: our query does not show the distance `d` that the reference's has; key: a column that names a row.
    """

    number: int
    kind: str
    sql: str
    check: Check
    params: dict[str, object] = field(default_factory=dict)
    limit: int | None = None
    offset: int = 0
    ordered: bool = False
    hidden: str = ""
    key: str = "id"

    @property
    def text(self) -> str:
        """The query as asked."""
        shown = self.sql.replace(self.hidden, "", 1) if self.hidden else self.sql
        limit = "" if self.limit is None else f" LIMIT {self.limit}"
        return shown + limit + (f" OFFSET {self.offset}" if self.offset else "")

    @property
    def reference(self) -> str:
        """The same for plain DuckDB; of a top-k all rows, in order."""
        sql = _CALL.sub(_plain, self.sql)
        return re.sub(r"things FOR VERSION AS OF (?:'previous'|<previous>)", "things_previous", sql)

    @property
    def frames(self) -> list[str]:
        return [name for name in ("picks", "brands", "asked") if re.search(rf"\b{name}\b", self.sql)]


_CALL = re.compile(r"\b(distance|similarity)\(([\w.]+), (\$\w+|vector_of\('[^']*'\)|[\w.]+)\)")


def _plain(call: re.Match[str]) -> str:
    function, column, other = call.groups()
    if other.startswith("$"):
        other = f"{other}::FLOAT[{DIM}]"
    elif other.startswith("vector_of"):
        name = column.rpartition(".")[2]
        other = f"(SELECT {name} FROM things WHERE id = {other[10:-1]})"
    plain = f"array_cosine_distance({column}, {other})"
    return plain if function == "distance" else f"(1 - {plain})"


class Draw:
    """Random pieces of a query, the same for the same number."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number_of_case = world, number
        self.rng = np.random.default_rng([20_240_601, number])
        self.params: dict[str, object] = {}

    def of(self, *values: object) -> object:
        return values[int(self.rng.integers(len(values)))]

    def number(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def column(self) -> str:
        return str(self.of("image_vec", "image_vec", "text_vec"))

    def id(self) -> str:
        return str(self.world.live.column("id")[self.number(0, self.world.live.num_rows)])

    def vector(self, column: str, name: str = "v") -> str:
        """A parameter: near a row, or a row of the other column. Of unit length already, so that it is not changed."""
        other = next(c for c in sql_world.VECTORS if c != column) if self.chance(0.3) else column
        values = self.world.vectors[other]
        start = values[self.rng.choice(np.flatnonzero(np.isfinite(values[:, 0])))]
        step = self.rng.normal(size=DIM)
        vector = start + float(self.of(0, 0.1, 0.3, 0.5)) * step / np.linalg.norm(step)
        for _ in range(5):
            vector = (vector / np.linalg.norm(vector)).astype(np.float32).astype(np.float64)
        self.params[name] = vector.tolist()
        return f"${name}"

    def threshold(self, column: str, name: str, rank: int) -> float:
        """A distance that about `rank` rows are below, clear of every row's."""
        distances = 1 - self.world.vectors[column] @ np.asarray(self.params[name])
        ordered = np.sort(distances[np.isfinite(distances)])
        at = rank + int(np.argmax(np.diff(ordered[rank - 1 :]) > _GAP))
        return round(float(ordered[at - 1] + ordered[at]) / 2, 8)

    def limit(self) -> dict[str, int]:
        limit = int(self.of(1, 3, 5, 10, 10, 10, 20, 50, 100, 500))
        return {"limit": limit, "offset": int(self.of(0, 0, 0, 0, 1, 10, 75))}

    def where(self, t: str = "", *more: str) -> str:
        """A WHERE of none to three conditions, and those given."""
        parts = [*more, *[self.condition(t) for _ in range(int(self.of(0, 1, 1, 1, 2, 3)))]]
        return f" WHERE {' AND '.join(parts)}" if parts else ""

    def condition(self, t: str = "") -> str:
        simple = self.simple(t)
        if self.chance(0.15):
            return f"({simple} OR {self.simple(t)})"
        return f"NOT ({simple})" if self.chance(0.1) else simple

    def simple(self, t: str) -> str:
        """One condition; some of them only DuckDB can evaluate."""
        ids = ", ".join(f"'{self.id()}'" for _ in range(40))
        number, rows = self.number(0, 100), self.world.live.num_rows
        share = int(rows * float(self.of(0.5, 0.3, 0.05, 0.05, 0.005, 0.0005)))
        day = f"2024-{self.number(1, 13):02d}-{self.number(1, 29):02d}"
        choices = [f"{t}stock < {share}"] * 5 + [
            f"{t}stock >= {share}",
            f"{t}price < {number}",
            f"{t}price <= {number}.5",
            f"{number} < {t}price",
            f"{t}price BETWEEN {number} AND {number + 30}",
            f"{t}price = -0.0",
            f"isnan({t}price)",
            f"{t}price IS NULL",
            f"{t}rating >= 2.5",
            f"{t}rating != 3",
            f"{t}rating < 0.1",
            f"{t}small > {number}",
            f"{t}small NOT IN (1, 2, {number})",
            f"{t}small = -1",
            f'{t}"Odd Name" = {number % 7 - 3}',
            f'{t}"Odd Name" IS NOT NULL',
            f'{t}"select" IN (0, 3)',
            f"{t}\"\u00e9tat\" = 'neuf'",
            f"{t}brand = 'acme'",
            f"{t}brand = 'O''Neil; co'",
            f"{t}brand = 'tiny'",
            f"{t}brand <> ''",
            f"{t}brand LIKE '%x\\%y%'",
            f"{t}brand LIKE 'Gr%'",
            f"{t}brand NOT LIKE 'a%'",
            f"{t}brand ILIKE 'ACME'",
            f"{t}brand IS NULL",
            f"{t}brand IN ('acme', 'bolt', NULL)",
            f"{t}brand IS DISTINCT FROM 'bolt'",
            f"lower({t}brand) = 'acme'",
            f"{t}title LIKE '%it''s%'",
            f"{t}title LIKE '%red_blue%'",
            f"{t}title > 'm'",
            f"length({t}title) < 12",
            f"{t}available",
            f"NOT {t}available",
            f"{t}available IS NOT TRUE",
            f"{t}day >= DATE '{day}'",
            f"{t}day = '{day}'",
            f"{t}seen_at < TIMESTAMP '{day} 12:00:00'",
            f"{t}seen_at < DATE '{day}'",
            f"month({t}day) = 5",
            f"{t}stock % 7 = 2",
            f"{t}price > {t}small",
            f"coalesce({t}price, 0) < {number}",
            f"CASE WHEN {t}available THEN {t}price < 40 ELSE {t}price > 40 END",
            f"{t}id IN ({ids})",
            f"{t}id > '{self.id()}'",
            f"{t}image_vec IS NOT NULL",
            f"{t}text_vec IS NULL",
            f"({t}price < {number} OR {t}stock < {share})",
            "1 = 1",
        ]
        return str(self.of(*choices))


def _outputs(draw: Draw) -> str:
    columns = ("title", "brand", "price", "rating", "stock", '"Odd Name"', '"select"', "available", "day", "seen_at")
    return ", ".join(["id", *[c for c in columns if draw.chance(0.3)]])


def nearest(draw: Draw) -> Case:
    column = draw.column()
    vector = f"vector_of('{_with_vector(draw, column)}')" if draw.chance(0.2) else draw.vector(column)
    measure = f"distance({column}, {vector})"
    last = draw.of("", ", id", ", id", ", price DESC NULLS FIRST, id", ", brand, id")
    outputs, key = _outputs(draw), draw.of("d", measure, f"similarity({column}, {vector}) DESC", "2")
    outputs = outputs.replace("id", f"id, {measure} AS d", 1)
    sql = f"SELECT {outputs} FROM things{draw.where()} ORDER BY {key}{last}"
    return _case(draw, sql, "nearest", **draw.limit(), ordered=bool(last))


def _with_vector(draw: Draw, column: str) -> str:
    rows = np.flatnonzero(np.isfinite(draw.world.vectors[column][:, 0]))
    return str(draw.world.live.column("id")[int(draw.rng.choice(rows))])


def hidden(draw: Draw) -> Case:
    column = draw.column()
    measure = f"distance({column}, {draw.vector(column)})"
    shown = f", {measure} AS d"
    sql = f"SELECT {_outputs(draw)}{shown} FROM things AS t{draw.where('t.')} ORDER BY {measure}, t.id"
    return _case(draw, sql, "nearest", **draw.limit(), ordered=True, hidden=shown)


def within(draw: Draw) -> Case:
    column = draw.column()
    vector = draw.vector(column)
    limit = draw.threshold(column, "v", int(draw.of(1, 5, 50, 500)))
    near = draw.of(f"distance({column}, {vector}) < {limit}", f"{1 - limit:.8f} <= similarity({column}, {vector})")
    sql = f"SELECT {_outputs(draw)}, distance({column}, {vector}) AS d FROM things{draw.where('', str(near))}"
    if draw.chance(0.5):
        return _case(draw, sql, "rows")
    return _case(draw, f"{sql} ORDER BY d, id", "nearest", **draw.limit(), ordered=True)


def plain(draw: Draw) -> Case:
    sql = (
        f"SELECT {_outputs(draw)}, stock + 1 AS more FROM things{draw.where()} ORDER BY id LIMIT {draw.number(1, 200)}"
    )
    return _case(draw, sql, "rows", ordered=True)


def aggregate(draw: Draw) -> Case:
    column = draw.column()
    vector, group = draw.vector(column), draw.of("brand", '"Odd Name"', "available", '"\u00e9tat"')
    having = draw.of("", "", " HAVING count(*) > 20", f" HAVING max(distance({column}, {vector})) > 0.2")
    sql = (
        f"SELECT {group}, count(*) AS n, sum(stock) AS s, avg(rating) AS r, min(distance({column}, {vector})) AS d, "
        f"arg_min(id, (distance({column}, {vector}), id)) AS id FROM things{draw.where()} GROUP BY {group}{having}"
    )
    return _case(draw, sql, "rows")


def join(draw: Draw) -> Case:
    column = draw.column()
    measure = f"distance(t.{column}, {draw.vector(column)})"
    if draw.chance(0.5):
        side = draw.of("JOIN", "LEFT JOIN")
        source = f"things t {side} brands b ON t.brand = b.brand{draw.of('', '', ' AND b.country = $c')}"
        draw.params |= {"c": "de"} if "$c" in source else {}
        more = ["b.country IS NOT NULL"] if draw.chance(0.2) else []
        sql = f"SELECT t.id, b.country, t.price, {measure} AS d FROM {source}{draw.where('t.', *more)} ORDER BY d, t.id"
        return _case(draw, sql, "nearest", **draw.limit(), ordered=True)
    source = draw.of("things t JOIN picks p USING (id)", "picks p JOIN things t ON p.id = t.id AND p.weight < 0.7")
    if draw.chance(0.2):
        sql = f"SELECT p.pick, t.id, {measure} AS d FROM picks p LEFT JOIN things t ON t.id = p.id AND {draw.condition('t.')}"  # noqa: E501
        return _case(draw, sql, "rows")
    sql = f"SELECT t.id || '/' || p.pick AS key, {measure} AS d FROM {source}{draw.where('t.')} ORDER BY d, p.pick"
    return _case(draw, sql, "nearest", **draw.limit(), ordered=True, key="key")


def distinct(draw: Draw) -> Case:
    column = draw.column()
    measure, group = f"distance({column}, {draw.vector(column)})", draw.of("brand", '"Odd Name"')
    sql = str(
        draw.of(
            f"SELECT DISTINCT ON ({group}) {group}, id FROM things{draw.where()} ORDER BY {group}, {measure}, id",
            f"SELECT DISTINCT {group}, available FROM things{draw.where()}",
            f"SELECT count(DISTINCT {group}) AS n, count(DISTINCT id) AS ids FROM things{draw.where()}",
            f"SELECT {group}, min({measure}) AS d FROM things{draw.where()} GROUP BY ALL ORDER BY d, 1 LIMIT 3",
        )
    )
    return _case(draw, sql, "rows")


def qualify(draw: Draw) -> Case:
    column, most, limit = draw.column(), draw.number(1, 4), draw.number(3, 20)
    measure, group = f"distance({column}, {draw.vector(column)})", draw.of("brand", '"Odd Name"', "available")
    sql = (
        f"SELECT id, {group}, {measure} AS d FROM things{draw.where()} "
        f"QUALIFY row_number() OVER (PARTITION BY {group} ORDER BY {measure}, id) <= {most} ORDER BY d, id LIMIT {limit}"  # noqa: E501
    )
    return _case(draw, sql, "ids", ordered=True)


def window(draw: Draw) -> Case:
    column = draw.column()
    measure = f"distance({column}, {draw.vector(column)})"
    sql = (
        f"SELECT id, rank() OVER (ORDER BY {measure} NULLS LAST, id) AS place, count(*) OVER (PARTITION BY brand) AS n "
        f"FROM things{draw.where()} ORDER BY {measure}, id LIMIT {draw.number(1, 30)}"
    )
    return _case(draw, sql, "rows", ordered=True)


def subquery(draw: Draw) -> Case:
    column, limit = draw.column(), int(draw.of(5, 20, 100))
    measure = f"distance({column}, {draw.vector(column)})"
    top = f"SELECT * FROM things{draw.where()} ORDER BY {measure}, id LIMIT {limit}"
    some = f"SELECT id, {measure} AS d FROM things WHERE {draw.condition()} AND id "
    choices = (
        (f"SELECT id, brand, price FROM ({top}) AS near WHERE {draw.condition()}", "ids"),
        (f"SELECT brand, count(*) AS n, list(id ORDER BY id) AS id FROM ({top}) AS near GROUP BY brand", "ids"),
        (f"SELECT id, title FROM things WHERE id IN (SELECT id FROM ({top}) AS near)", "ids"),
        (some + "IN (SELECT id FROM picks WHERE weight > 0.5)", "rows"),
        (some + "NOT IN (SELECT id FROM picks WHERE id IS NOT NULL)", "rows"),
        (f"SELECT t.id FROM things t WHERE EXISTS (SELECT 1 FROM picks p WHERE p.id = t.id){_and(draw)}", "rows"),
        (f"SELECT id, (SELECT count(*) FROM picks p WHERE p.id = t.id) AS n FROM things t{draw.where('t.')}", "rows"),
        (f"SELECT id FROM things WHERE {measure} < (SELECT min({measure}) + 0.05 FROM things)", "rows"),
    )
    sql, check = choices[draw.number(0, len(choices))]
    return _case(draw, sql, check)


def _and(draw: Draw) -> str:
    return "".join(f" AND {draw.condition('t.')}" for _ in range(draw.number(0, 3)))


def cte(draw: Draw) -> Case:
    first, second, limit = draw.vector("image_vec", "v"), draw.vector("text_vec", "w"), int(draw.of(5, 10, 50))
    pictures = (
        f"SELECT id, brand, distance(image_vec, {first}) AS d FROM things{draw.where()} ORDER BY d, id LIMIT {limit}"
    )
    texts = (
        f"SELECT id, brand, distance(text_vec, {second}) AS d FROM things{draw.where()} ORDER BY d, id LIMIT {limit}"
    )
    word = draw.of("UNION ALL", "UNION ALL", "UNION", "INTERSECT", "EXCEPT")
    choices = (
        f"WITH a AS ({pictures}), b AS ({texts}) SELECT id FROM a {word} SELECT id FROM b",
        f"({pictures}) UNION ALL ({texts})",
        f"WITH a AS ({pictures}) SELECT a.id, b.country FROM a LEFT JOIN brands b USING (brand)",
        f"WITH a AS ({pictures}) SELECT t.id, a.d, distance(t.text_vec, $w) AS e FROM a JOIN things t ON t.id = a.id",
        f"WITH a AS (FROM things{draw.where()}) SELECT id, distance(text_vec, $w) AS d FROM a ORDER BY d, id LIMIT {limit}",  # noqa: E501
    )
    sql = choices[draw.number(0, len(choices))]
    return _case(draw, sql, "ids")


def columns(draw: Draw) -> Case:
    sql = f"SELECT id, distance(image_vec, text_vec) AS d FROM things{draw.where()} ORDER BY d, id"
    return _case(draw, sql, "nearest", **draw.limit(), ordered=True)


def parameters(draw: Draw) -> Case:
    column = draw.column()
    sql = (
        f"SELECT id, distance({column}, {draw.vector(column)}) AS d FROM things WHERE price < $most AND brand = $brand "
        "OR stock IN ($one, $two) ORDER BY d, id"
    )
    brand = draw.of(*[b for b in sql_world.BRANDS if b])
    draw.params |= {"most": draw.number(5, 80), "brand": brand, "one": draw.number(0, 9000), "two": 5}
    return _case(draw, sql, "nearest", **draw.limit(), ordered=True)


def version(draw: Draw) -> Case:
    column = draw.column()
    measure, then = f"distance(b.{column}, {draw.vector(column)})", f"things FOR VERSION AS OF {draw.of(*_VERSIONS)}"
    if draw.chance(0.5):
        sql = f"SELECT b.id, b.price, {measure} AS d FROM {then} AS b{draw.where('b.')} ORDER BY d, b.id"
        return _case(draw, sql, "nearest", **draw.limit(), ordered=True)
    choices = (
        f"SELECT count(*) AS n, sum(b.stock) AS s FROM {then} AS b{draw.where('b.')}",
        f"SELECT id FROM {then} AS b{draw.where('b.')} EXCEPT SELECT id FROM things",
        f"SELECT b.id, distance(a.{column}, b.{column}) AS d FROM things a JOIN {then} AS b ON a.id = b.id{draw.where('b.')}",  # noqa: E501
    )
    return _case(draw, choices[draw.number(0, len(choices))], "rows")


_VERSIONS = ("'previous'", "<previous>")


def lateral(draw: Draw) -> Case:
    column, limit = draw.column(), draw.number(1, 8)
    near = f"SELECT t.id, t.brand, distance(t.{column}, a.v) AS d FROM things t{draw.where('t.')} ORDER BY d, t.id LIMIT {limit}"  # noqa: E501
    some = draw.of("", f" WHERE a.q < {draw.number(1, 12)}", " WHERE a.topic = 't3'")
    word = draw.of(", LATERAL", " CROSS JOIN LATERAL", " LEFT JOIN LATERAL")
    on = " ON true" if word == " LEFT JOIN LATERAL" else ""
    return _case(draw, f"SELECT a.q, n.id, n.brand, n.d FROM asked a{word} ({near}) n{on}{some}", "ids")


def pairs(draw: Draw) -> Case:
    column, limit = draw.column(), round(float(draw.of(0.0001, 0.02, 0.05)) + 1.5e-6, 7)
    ids = ", ".join(f"'{draw.id()}'" for _ in range(60))
    few = draw.of("a.stock < 150", "a.brand = 'tiny'", f"a.id IN ({ids})")
    sql = (
        f"SELECT a.id || '/' || b.id AS id, distance(a.{column}, b.{column}) AS d FROM things a "
        f"JOIN things b ON distance(a.{column}, b.{column}) < {limit} AND a.id < b.id WHERE {few}"
    )
    return _case(draw, sql, "ids")


KINDS: tuple[Callable[[Draw], Case], ...] = (
    *(nearest, join, within, aggregate, version, subquery, lateral, nearest, cte, nearest, hidden, qualify),
    *(nearest, version, within, join, subquery, pairs, nearest, aggregate, distinct, plain, window, cte, nearest),
    *(parameters, lateral, columns, nearest, within),
)


def kind(number: int) -> str:
    return KINDS[number % len(KINDS)].__name__


def case(world: World, number: int) -> Case:
    """The case of that number."""
    draw = Draw(world, number)
    return KINDS[number % len(KINDS)](draw)


def _case(draw: Draw, sql: str, check: Check, **facts: object) -> Case:
    params = {name: value for name, value in draw.params.items() if re.search(rf"\${name}\b", sql)}
    return Case(draw.number_of_case, kind(draw.number_of_case), sql, check, params, **facts)
