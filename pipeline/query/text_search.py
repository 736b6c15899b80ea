"""bm25() and hybrid(): full-text scores out of Lance's inverted index, alone and fused with the nearest vectors.

Assumes: as everywhere, DuckDB evaluates the whole query on what is read. A score is looked up by the row's id; reading
only the rows that match, or only the best, decides speed and never an answer. Rows without a match score 0, rows
without a text NULL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pyarrow as pa
import sqlglot
from sqlglot import exp

from conjoin.pipeline import full_text
from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.analysis import Analysis, Reference
from conjoin.pipeline.query.filters import conjuncts
from conjoin.pipeline.query.functions import Measure, Rewritten, name_outputs
from conjoin.pipeline.query.parse import DIALECT, function_name, shown
from conjoin.pipeline.query.planner import Read, TopK, count_of, obstacle, pushable, sort_key, split
from conjoin.pipeline.query.relations import nearest_name, projection
from conjoin.pipeline.query.scalar import Function, fresh_name

# Reciprocal rank fusion: Cormack, Clarke, Buettcher 2009, with their constant.
CONSTANT = 60
DEPTH = 100  # of either list; what stands below it adds less than 1/160, and 1,000 cost three times as much
_MOST_ROWS = 20_000  # matching rows that are fetched one by one; for more, a scan is quicker
_SLACK = 16
_FUSED = (
    "(CASE WHEN isfinite(d__) AND rank() OVER (ORDER BY d__ NULLS LAST) <= {depth} "
    "THEN 1e0 / ({k} + rank() OVER (ORDER BY d__ NULLS LAST)) ELSE 0e0 END + "
    "CASE WHEN s__ > 0 AND rank() OVER (ORDER BY s__ DESC NULLS LAST) <= {depth} "
    "THEN 1e0 / ({k} + rank() OVER (ORDER BY s__ DESC NULLS LAST)) ELSE 0e0 END)"
)


@dataclass(frozen=True, slots=True)
class Score:
    """bm25(column, words) of one table. name: the function of the row's id that stands for it in DuckDB; parameter:
    the query's, that the words came from."""

    name: str
    reference: Reference
    column: str
    words: str
    id: str
    parameter: str | None = None

    def function(self, scores: Mapping[object, float]) -> Function:
        """scores: by id, of the rows that match."""
        assert self.reference.relation.dataset is not None
        is_text = pa.types.is_string(self.reference.relation.schema.field(self.id).type)
        return Function(self.name, ("VARCHAR" if is_text else "BIGINT",), "DOUBLE", partial(_look_up, scores))


def _look_up(scores: Mapping[object, float], ids: pa.ChunkedArray | pa.Array) -> pa.Array:
    return pa.array([scores.get(key, 0.0) for key in ids.to_pylist()], pa.float64())


@dataclass(frozen=True, slots=True)
class Hybrid:
    """A hybrid() that now is two ranks; node: without parentheses."""

    node: exp.Expr
    score: Score
    depth: int


@dataclass(slots=True)
class Texts:
    """What was found in a query: scores by the id of the node that computes them."""

    scores: dict[int, Score] = field(default_factory=dict)
    hybrids: list[Hybrid] = field(default_factory=list)

    def all(self) -> list[Score]:
        return [*self.scores.values(), *(hybrid.score for hybrid in self.hybrids)]

    def of(self, reference: Reference) -> list[Score]:
        """The distinct scores of one table."""
        return list({score.name: score for score in self.all() if score.reference is reference}.values())


@dataclass(frozen=True, slots=True)
class TextPlan:
    """How the full-text index answers for one table. matching: only its matches can pass WHERE.

    best: of `need` rows in all, sorted by it first; fused: the same for hybrid(), with its measure; ties: further sort
    keys follow.
    """

    scores: tuple[Score, ...]
    matching: Score | None = None
    best: Score | None = None
    fused: tuple[Hybrid, Measure] | None = None
    need: int = 0
    ties: bool = False

    def asked(self, words: Mapping[str, object]) -> TextPlan:
        """The same for other words, by parameter."""
        scores = {
            score.name: score if score.parameter is None else replace(score, words=str(words[score.parameter]))
            for score in self.scores
        }
        matching, best = (score and scores[score.name] for score in (self.matching, self.best))
        fused = self.fused and (replace(self.fused[0], score=scores[self.fused[0].score.name]), self.fused[1])
        return replace(self, scores=tuple(scores.values()), matching=matching, best=best, fused=fused)

    def explained(self) -> list[str]:
        """Lines for people."""
        lines = []
        for score in self.scores:
            if self.fused and score is self.fused[0].score:
                rows = f"the best {self.fused[0].depth:,}, and as many nearest vectors, fused by rank"
            elif score is self.best:
                rows = f"the best {self.need:,} rows"
            else:
                rows = "matching rows only" if score is self.matching else "scores of all matching rows"
            lines.append(f"full-text index of {score.column}, {score.words!r}: {rows}")
        return lines


@dataclass(frozen=True, slots=True)
class Found:
    """rows: what DuckDB reads, None where the plan of the table itself says; functions: look scores up."""

    rows: pa.Table | None
    functions: tuple[Function, ...]


def expand(analysis: Analysis, bound: dict[str, object]) -> Texts:
    """Replace bm25(column, words) and hybrid(vectors, column, words) in the tree; takes from `bound` the parameters
    that are words and stand nowhere else.

    Raises QueryError for a column without a full-text index, and for wrong arguments or places.
    """
    texts = Texts()
    calls = {name: [n for n in analysis.tree.find_all(exp.Anonymous) if function_name(n) == name] for name in _NAMES}
    taken = {p.name for nodes in calls.values() for node in nodes for p in node.find_all(exp.Placeholder)}
    for name, nodes in calls.items():
        name_outputs(nodes)
        for node in nodes:
            _NAMES[name](analysis, bound, node, texts)
    for name in taken - {placeholder.name for placeholder in analysis.tree.find_all(exp.Placeholder)}:
        bound.pop(name, None)
    return texts


_Bound = Mapping[str, object]


def _bm25(analysis: Analysis, bound: _Bound, node: exp.Anonymous, texts: Texts) -> None:
    where = shown(node)
    if len(node.expressions) != 2:
        raise QueryError("bm25() takes a text column and words", where=where)
    column, words = (argument.unnest() for argument in node.expressions)
    score = _score(analysis, bound, column, words, list(texts.scores.values()))
    made = _call(column, score)
    texts.scores[id(made)] = score
    node.replace(made)


def _hybrid(analysis: Analysis, bound: _Bound, node: exp.Anonymous, texts: Texts) -> None:
    where = shown(node)
    if len(node.expressions) not in (3, 4):
        raise QueryError("hybrid() takes a vector column, a text column, words and, if you like, a depth", where=where)
    vector, column, words = (argument.unnest() for argument in node.expressions[:3])
    depth = _depth(node.expressions[3].unnest(), where) if len(node.expressions) == 4 else DEPTH
    score = _score(analysis, bound, column, words, [hybrid.score for hybrid in texts.hybrids])
    _check_place(node, where)
    made = sqlglot.parse_one(_FUSED.format(depth=depth, k=CONSTANT), read=DIALECT)
    for place in list(made.find_all(exp.Column)):
        place.replace(_distance(analysis, vector, words) if place.name == "d__" else _call(column, score))
    node.replace(made)
    texts.hybrids.append(Hybrid(made.unnest(), score, depth))


_NAMES: Mapping[str, Callable[[Analysis, _Bound, exp.Anonymous, Texts], None]] = {"bm25": _bm25, "hybrid": _hybrid}


def _call(column: exp.Expr, score: Score) -> exp.Case:
    owner = column.table if isinstance(column, exp.Column) and column.table else score.reference.alias
    call = exp.Anonymous(this=score.name, expressions=[exp.column(score.id, table=owner, quoted=True)])
    call.meta["per_row"] = True
    return exp.Case().when(column.copy().is_(exp.null()), exp.null()).else_(call)


def _distance(analysis: Analysis, vector: exp.Expr, words: exp.Expr) -> exp.Expr:
    copy = vector.copy()
    if id(vector) in analysis.scope_of_column:
        analysis.scope_of_column[id(copy)] = analysis.scope_of_column[id(vector)]
    text = exp.Anonymous(this="text", expressions=[words.copy()])
    return exp.Anonymous(this="distance", expressions=[copy, text])


def _depth(node: exp.Expr, where: str) -> int:
    if isinstance(node, exp.Literal) and not node.is_string and node.this.isdigit() and int(node.this) > 0:
        return int(node.this)
    raise QueryError("the depth of hybrid() is a whole number above 0", where=where)


def _check_place(node: exp.Expr, where: str) -> None:
    """Ranks are of the rows that WHERE leaves of one table: nothing else would be the ranks that people mean."""
    if node.find_ancestor(exp.Where, exp.Group, exp.Having, exp.Join, exp.AggFunc):
        advice = "Use it in SELECT, ORDER BY or QUALIFY; in a WHERE outside if it stands in a subquery"
        raise QueryError("hybrid() ranks the rows that WHERE leaves", where=where, next=advice)
    select = node.find_ancestor(exp.Select)
    if select is not None and (select.args.get("joins") or select.args.get("laterals") or select.args.get("group")):
        raise QueryError(
            "hybrid() ranks the rows of one table", where=where, next="Compute it in a WITH or subquery, then join"
        )


def _score(analysis: Analysis, bound: _Bound, column: exp.Expr, words: exp.Expr, known: Sequence[Score]) -> Score:
    where = shown(words.find_ancestor(exp.Anonymous) or words)
    parameter = words.name if isinstance(words, exp.Placeholder) else None
    said = bound.get(parameter) if parameter else words.this
    if not isinstance(said, str) or not (parameter or words.is_string):
        raise QueryError("words to look for are one literal or parameter, a text", where=where)
    origin = analysis.origin(column) if isinstance(column, exp.Column) else None
    if not isinstance(column, exp.Column) or origin is None:
        raise QueryError(f"{shown(column)} is not a column that can be traced to a table", where=where)
    reference, name = origin
    _check_index(reference, name, where)
    if not _is_direct(analysis, column, reference):
        advice = f"Compute it inside, where {reference.relation.name} stands in FROM, and name it"
        raise QueryError("a full-text score needs the table itself, not a subquery", where=where, next=advice)
    for score in known:
        # as in functions.py: what is a parameter is not the same as a literal that equals it today
        same = score.reference is reference and (score.parameter is None) == (parameter is None)
        if same and (score.column, score.words) == (name, said):
            return score
    key = reference.relation.column("id")
    if key is None:
        raise QueryError(f"{reference.relation.name} has no id column, which full-text scores need", where=where)
    reference.columns.add(key)
    return Score(fresh_name("bm25_"), reference, name, said, key, parameter)


def _check_index(reference: Reference, name: str, where: str) -> None:
    relation = reference.relation
    if relation.dataset is None:
        raise QueryError(f"{relation.name} is a frame: only tables have full-text indexes", where=where)
    if full_text.text_index(relation.dataset, name) is not None:
        return
    indexed = [n for n in relation.schema.names if full_text.text_index(relation.dataset, n) is not None]
    declared = ", ".join([*indexed, name])
    raise QueryError(
        f"{name} of {relation.name} has no full-text index{nearest_name(name, indexed)}",
        where=where,
        next=f"Declare it in the run file, `table.full_text: [{declared}]`; the next `conjoin run` builds it",
    )


def _is_direct(analysis: Analysis, column: exp.Column, reference: Reference) -> bool:
    """Whether the table itself stands in a FROM around the column, under the name that the column bears."""
    scope = analysis.scope_of_column.get(id(column))
    while scope is not None:
        for alias, source in analysis.sources(scope).items():
            if source is reference and column.table.lower() in ("", alias):
                return not reference.node.alias_column_names
        scope = scope.parent
    return False


def plan(analysis: Analysis, rewritten: Rewritten, read: Read, texts: Texts) -> TextPlan | None:
    """How the index answers for this read; None if nothing of it is asked."""
    reference, scores = read.reference, tuple(texts.of(read.reference))
    select = reference.scope.expression
    if not scores or not isinstance(select, exp.Select):
        return TextPlan(scores) if scores else None
    where = select.args.get("where")
    parts = conjuncts(where.this if where else None) if pushable(reference) else []
    asked = [score for part in parts if (score := _asked(part, select, texts)) and score.reference is reference]
    matching = asked[0] if asked else None
    limit, offset = count_of(select.args.get("limit")), count_of(select.args.get("offset"), missing=0)
    key = sort_key(select)
    found = TextPlan(scores, matching)
    if key is None or limit is None or offset is None or not key[1]:
        return found
    kept = [_asked(part, select, texts) for part in split(analysis, reference)[1]]
    hybrid = next((h for h in texts.hybrids if h.node is key[0] and h.score.reference is reference), None)
    passing = frozenset(id(h.node) for h in texts.hybrids) if hybrid else frozenset()
    if obstacle(select, reference, passing):
        return found
    ties = len(select.args["order"].expressions) > 1
    best = texts.scores.get(id(key[0]))
    if best is not None and best.reference is reference and all(score is best for score in kept):
        return TextPlan(scores, matching, best, None, limit + offset, ties)
    alone = hybrid is not None and all(_same(other, hybrid) for other in texts.hybrids)
    measure = _measure(hybrid, rewritten) if hybrid and alone else None
    if hybrid and measure and not kept:
        return TextPlan(scores, None, None, (hybrid, measure), limit + offset, ties)
    return found


def _same(one: Hybrid, other: Hybrid) -> bool:
    return one.score is other.score and one.node == other.node


def _measure(hybrid: Hybrid, rewritten: Rewritten) -> Measure | None:
    return next((m for node in hybrid.node.walk() if (m := rewritten.measures.get(id(node)))), None)


def _asked(part: exp.Expr, select: exp.Select, texts: Texts) -> Score | None:
    """The score whose matches alone can make this condition true: bm25(...) > 0 and the like."""
    if not isinstance(part, exp.GT | exp.GTE | exp.LT | exp.LTE):
        return None
    left, right = part.this.unnest(), part.expression.unnest()
    if isinstance(part, exp.LT | exp.LTE):
        left, right = right, left
    if isinstance(left, exp.Column) and not left.table:
        named = [o for o in select.expressions if isinstance(o, exp.Alias) and o.alias.lower() == left.name.lower()]
        left = named[0].this.unnest() if len(named) == 1 else left
    score = texts.scores.get(id(left))
    if score is None or not isinstance(right, exp.Literal) or right.is_string:
        return None
    strict = isinstance(part, exp.GT | exp.LT)
    return score if float(right.this) > 0 or strict else None


def search(read: Read, planned: TextPlan, nearest: Callable[[TopK], pa.Table | None]) -> Found:
    """Ask the index. nearest: candidates of a vector search over the same rows, None where only a scan can tell."""
    rows: pa.Table | None = None
    known: _Known = {}
    if planned.best is not None:
        rows, known = _best(read, planned)
    elif planned.fused is not None:
        rows, known = _fused(read, planned, nearest)
    functions = []
    for score in planned.scores:
        if score.name not in known:
            known[score.name] = _scores(_hits(read, score), score)
        functions.append(score.function(known[score.name]))
    if planned.matching is not None and rows is None and len(known[planned.matching.name]) <= _MOST_ROWS:
        rows = _hits(read, planned.matching, read.columns).select(list(read.columns))
    return Found(rows, tuple(functions))


_Known = dict[str, Mapping[object, float]]


def _best(read: Read, planned: TextPlan) -> tuple[pa.Table | None, _Known]:
    """The rows that sort first; no rows if fewer match than are wanted, since then others follow."""
    score = planned.best
    assert score is not None
    rows = _ranked(read, score, planned.need, ties=planned.ties)
    if rows.num_rows < planned.need and planned.matching is not score:
        return None, {}
    return rows.select(list(read.columns)), {score.name: _scores(rows, score)}


def _fused(read: Read, planned: TextPlan, nearest: Callable[[TopK], pa.Table | None]) -> tuple[pa.Table | None, _Known]:
    """Both lists; each holds every row above its last one, so that ranks within it are those of the whole table."""
    assert planned.fused is not None
    hybrid, measure = planned.fused
    near = nearest(TopK(measure, hybrid.depth, ties=True))
    if near is None:
        return None, {}
    rows = _ranked(read, hybrid.score, hybrid.depth, ties=True)
    key, seen = hybrid.score.id, set(near.column(hybrid.score.id).to_pylist())
    others = rows.filter(pa.array([value not in seen for value in rows.column(key).to_pylist()], pa.bool_()))
    both = pa.concat_tables([near.select(list(read.columns)), others.select(list(read.columns))])
    if both.num_rows < planned.need:
        return None, {}
    return both, {hybrid.score.name: _scores(rows, hybrid.score)}


def _ranked(read: Read, score: Score, need: int, *, ties: bool) -> pa.Table:
    """At least the `need` best rows, where so many match; with `ties` also all that equal the last of them."""
    fetch = max(need, 1) + _SLACK
    while True:
        rows = _hits(read, score, read.columns, fetch)
        scores = sorted(rows.column("_score").to_pylist(), reverse=True)
        if len(scores) < fetch or not ties or scores[max(need, 1) - 1] > scores[-1]:
            return rows
        fetch *= 4


def _hits(read: Read, score: Score, columns: Sequence[str] = (), limit: int | None = None) -> pa.Table:
    """Rows that match any of the words, under the read's filter: id, `columns`, _score; the best `limit` of them."""
    from lance.query import MatchQuery

    relation = score.reference.relation
    assert relation.dataset is not None
    wanted = {**projection(relation, dict.fromkeys([score.id, *columns])), "_score": "_score"}
    return relation.dataset.scanner(
        columns=wanted,
        filter=read.filter,
        prefilter=True,
        limit=limit,
        full_text_query=MatchQuery(score.words, score.column),
    ).to_table()


def _scores(rows: pa.Table, score: Score) -> dict[object, float]:
    return dict(zip(rows.column(score.id).to_pylist(), rows.column("_score").to_pylist(), strict=True))
