"""A published table that answers SQL and plain searches.

Assumes: every query is answered from one version of the table, the one that its tag names when the query starts.
"""

from __future__ import annotations

import posixpath
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
from sqlglot import exp

from conjoin.pipeline import store
from conjoin.pipeline.errors import QueryError, TableError
from conjoin.pipeline.index import Setting, settings
from conjoin.pipeline.query import ranked, text_search
from conjoin.pipeline.query.effort import DEFAULT, EXACT, Effort, wanted_effort
from conjoin.pipeline.query.execute import Engine
from conjoin.pipeline.query.explanation import (
    Clock,
    Explanation,
    Measured,
    Times,
    explain_read,
    recall_of_distances,
    recall_of_rows,
    told,
)
from conjoin.pipeline.query.parameters import Params
from conjoin.pipeline.query.parse import parse, parse_condition, split_explain
from conjoin.pipeline.query.planner import Read, TopK
from conjoin.pipeline.query.plans import Plans
from conjoin.pipeline.query.prepared import Prepared, prepare
from conjoin.pipeline.query.questions import Question, outcome
from conjoin.pipeline.query.relations import Relation, frame_relation, nearest_name, table_relation
from conjoin.pipeline.query.result import Result
from conjoin.pipeline.query.search import candidates, choose
from conjoin.pipeline.query.sources import Sources
from conjoin.pipeline.query.tables import NamedTables, Relations, describe
from conjoin.pipeline.query.text_search import TextPlan
from conjoin.pipeline.query.vectors import QueryVectors

if TYPE_CHECKING:
    import lance
    import numpy as np

    from conjoin.pipeline.query.expressions import EmbeddedColumn

Settings = Callable[[Relation], Mapping[str, Setting]]
_SEARCHED = ("image", "text", "audio")  # whose vectors a search looks at, unless told: the first that the table has


@dataclass(frozen=True, slots=True)
class _Answer:
    """How its tables were read, and what that took."""

    result: Result
    prepared: Prepared
    sources: Sources
    times: Times

    def distances(self) -> np.ndarray | None:
        """Of the rows of the outermost SELECT, sorted; None where it does not sort by a distance."""
        tree = self.prepared.tree
        for read in self.prepared.reads:
            if read.order is not None and isinstance(tree, exp.Select) and read.reference.scope.expression is tree:
                return self.sources.distances(outcome(tree, *read.order))
        return None


class Table:
    """A Lance table at a tag or version. Safe to share between threads."""

    def __init__(
        self,
        uri: str,
        version: str | int | None = store.LIVE,
        name: str | None = None,
        tables: Mapping[str, str | Sequence[str]] | None = None,
    ) -> None:
        """name: what SQL calls it; default: the file's name; tables: paths of others by name (query/tables.py).

        Raises TableError if it cannot be opened.
        """
        self.uri = uri.rstrip("/")
        self.name = name or posixpath.basename(self.uri).removesuffix(".lance")
        self._wanted, self._named = version, NamedTables(tables)
        self._lock = threading.Lock()
        self._engine, self._vectors = Engine(), QueryVectors()
        self._settings: dict[tuple[str, int, Effort], Mapping[str, Setting]] = {}
        self._plans = Plans()
        self._dataset: lance.LanceDataset = store.open_version(self.uri, version)
        self._pinned = table_relation(self.name, self.uri, self._dataset)

    @property
    def version(self) -> int:
        """The version that a query would read now."""
        return int(self._current().version)

    @property
    def schema(self) -> pa.Schema:
        return self._current().schema

    def sql(
        self, query: str, params: Params = None, *, exact: bool = False, recall: float | None = None, **frames: object
    ) -> Result:
        """Answer one SELECT. frames: further tables by name (Arrow, pandas, polars, list of dicts, or another Table).

        params: values for `?` in order, or for `$name` by name; exact: no index of vectors is used; recall: at least
        this, measured, instead of what the index was made for. EXPLAIN and EXPLAIN ANALYZE give their lines.
        Raises QueryError, or EncoderError for text() and the like whose encoder cannot be loaded.
        """
        mode, select = split_explain(query)
        effort = wanted_effort(exact=exact, recall=recall)
        if mode:
            return self._explain(select, params, frames, effort, analyze=mode == "analyze").result()
        if frames:
            return self._answer(self._prepare(parse(select), params, frames), effort).result
        dataset = self._current()
        prepared = self._plans.find(select, params, dataset) or self._prepare(parse(select), params, frames)
        try:
            return self._answer(prepared, effort).result
        finally:
            self._plans.keep(select, params, dataset, prepared)

    def tables(self) -> pa.Table:
        """What SQL can name: one row per table, its own first."""
        names = [self.name, *self._named.paths]
        places = [self.uri, *(", ".join(paths) for paths in self._named.paths.values())]
        return pa.table({"table": names, "path": places})

    def describe(self, name: str | None = None) -> pa.Table:
        """One row per column of a table. Raises QueryError if there is none of that name."""
        relations, wanted = self._relations({}), (name or self.name).lower()
        if wanted not in relations:
            raise QueryError(f"there is no table {name!r}{nearest_name(wanted, relations)}")
        return describe(relations[wanted])

    def explain(
        self,
        query: str,
        params: Params = None,
        *,
        analyze: bool = False,
        exact: bool = False,
        recall: float | None = None,
        **frames: object,
    ) -> Explanation:
        """How a query would be answered, in plain words, without answering it; query: with or without EXPLAIN.

        analyze: answer it, and exactly as well, and say what each stage took and the recall of this very query.
        """
        mode, select = split_explain(query)
        effort = wanted_effort(exact=exact, recall=recall)
        return self._explain(select, params, frames, effort, analyze=analyze or mode == "analyze")

    def _explain(
        self, query: str, params: Params, frames: Mapping[str, object], effort: Effort, *, analyze: bool
    ) -> Explanation:
        def plan() -> Prepared:
            return self._prepare(parse(query), params, frames)

        prepared, explained = plan(), []
        for read in prepared.reads:
            text = prepared.texts.get(read.reference.name)
            settings = self._index_settings(effort, read.reference.relation) if read.measure else {}
            explained.append(explain_read(read, settings, text.explained() if text else (), exact=effort.exact))
        if not analyze:
            return Explanation(tuple(explained))
        found, exact = self._answer(plan(), effort), self._answer(plan(), EXACT)
        recall = recall_of_distances(*[answer.distances() for answer in (found, exact)])
        if recall is None:
            recall = recall_of_rows(found.result.table, exact.result.table)
        became = tuple(told(gathered) for gathered in found.sources.gathered.values())
        return Explanation(tuple(explained), Measured(found.times, len(found.result), recall, became))

    def search(
        self,
        words: str | None = None,
        *,
        image: str | bytes | None = None,
        audio: str | bytes | None = None,
        column: str | None = None,
        where: str | None = None,
        k: int = 10,
    ) -> Result:
        """The k rows nearest to words, a picture or a sound, with their `distance`; `where` is a SQL condition.

        column: the vector column to search; default: the pictures', else the texts'.
        """
        given = {
            kind: value for kind, value in (("text", words), ("image", image), ("audio", audio)) if value is not None
        }
        if len(given) != 1:
            raise QueryError("search for words, an image or an audio: exactly one of them")
        if k < 0:
            raise QueryError(f"k is a number of rows, not {k}")
        kind, value = next(iter(given.items()))
        select = self._search_query(self._search_column(column), kind, k)
        if where:
            select = select.where(parse_condition(where))
        return self._answer(self._prepare(select, {"query": value}, {})).result

    def _search_query(self, column: str, kind: str, k: int) -> exp.Select:
        hidden = {name for name in self.schema.names if name.endswith(("_vec", "_hash"))} | set(
            self._relation().vectors
        )
        shown = [exp.column(name, quoted=True) for name in self.schema.names if name not in hidden]
        vector = exp.Anonymous(this=kind, expressions=[exp.Placeholder(this="query")])
        distance = exp.Anonymous(this="distance", expressions=[exp.column(column, quoted=True), vector])
        measured = exp.alias_(distance, "distance", quoted=True)
        table = exp.to_identifier(self.name, quoted=True)
        return exp.select(*shown, measured).from_(exp.Table(this=table)).order_by(distance.copy()).limit(k)

    def _search_column(self, wanted: str | None) -> str:
        vectors = self._relation().vectors
        if wanted is not None:
            if wanted not in vectors:
                raise QueryError(f"there is no vector column {wanted!r}{nearest_name(wanted, vectors)}", where=self.uri)
            return wanted
        by_modality = {vector.modality: name for name, vector in vectors.items()}
        found = next((by_modality[modality] for modality in _SEARCHED if modality in by_modality), None)
        if found is None:
            raise QueryError("the table has no vector column that conjoin made", where=self.uri)
        return found

    def _answer(self, prepared: Prepared, effort: Effort = DEFAULT) -> _Answer:
        clock = Clock()
        vectors = {wanted.name: self._vectors.make(wanted) for wanted in prepared.rewritten.wanted}
        functions = [c.function(self._vectors.encoder(c.column)) for c in prepared.classifiers]
        functions += [embedded.function(self._vectors) for embedded in prepared.rewritten.embedded]
        clock.lap("embed")
        values = {**prepared.parameters, **{name: vector.tolist() for name, vector in vectors.items()}}

        def ask(question: Question, sources: Mapping[str, object]) -> pa.Table:
            given = {name: value for name, value in values.items() if name in question.parameters}
            return self._engine.run(question.sql, given, sources, functions)

        settings = partial(self._index_settings, effort)

        def embed(column: EmbeddedColumn, values: list[str | None]) -> tuple[np.ndarray, np.ndarray]:
            return column.vectors_of(values, self._vectors)

        sources = Sources(prepared.reads, prepared.questions, vectors, settings, ask, embed)
        for read in prepared.reads:
            found = self._search_text(read, prepared.texts.get(read.reference.name), vectors, settings)
            functions += found.functions if found else ()
            if found is not None and found.rows is not None:
                sources.put(read.reference.name, found.rows)
        sources.gather()
        clock.lap("search")
        answer = _ranked(prepared, sources, vectors)
        if answer is None:
            answer = self._engine.run(prepared.sql, values, sources.by_name, functions)
        clock.lap("finish")
        return _Answer(Result(answer, prepared.versions), prepared, sources, clock.times())

    def _prepare(self, tree: exp.Query, params: Params, frames: Mapping[str, object]) -> Prepared:
        return prepare(tree, params, self._relations(frames), self._engine)

    def _relations(self, frames: Mapping[str, object]) -> Relations:
        found = {self.name.lower(): self._relation()}
        for name, value in frames.items():
            if name.lower() in found or name in self._named:
                raise QueryError(
                    f"the name {name!r} is taken by {'the table itself' if name.lower() in found else 'a named table'}",
                    next="Pass the frame by another name",
                )
            found[name.lower()] = value._relation(name) if isinstance(value, Table) else frame_relation(name, value)
        return Relations(found, self._named)

    def _relation(self, name: str | None = None) -> Relation:
        dataset = self._current()
        with self._lock:
            if self._pinned.dataset is not dataset:
                self._pinned = table_relation(self.name, self.uri, dataset)
            return replace(self._pinned, name=name) if name else self._pinned

    def _current(self) -> lance.LanceDataset:
        """The pinned version's handle; a fresh one when the tag has moved, since a handle never follows it."""
        with self._lock:
            if not self._is_current():
                self._dataset = store.open_version(self.uri, self._wanted)
            return self._dataset

    def _is_current(self) -> bool:
        if self._wanted is None:
            return bool(self._dataset.latest_version == self._dataset.version)
        if isinstance(self._wanted, int):
            return True
        try:
            return bool(self._dataset.tags.get_version(self._wanted) == self._dataset.version)
        except ValueError:  # the tag is gone
            return False

    def _index_settings(self, effort: Effort, relation: Relation) -> Mapping[str, Setting]:
        """How to use the indexes of a table; none of them for an exact answer."""
        if effort.exact or relation.dataset is None:
            return {}
        key = (relation.uri, int(relation.dataset.version), effort)
        with self._lock:
            if key not in self._settings:
                self._settings[key] = effort.applied(relation, settings(relation.uri, relation.dataset))
            return self._settings[key]

    def _search_text(
        self, read: Read, planned: TextPlan | None, vectors: Mapping[str, np.ndarray], settings: Settings
    ) -> text_search.Found | None:
        if planned is None:
            return None

        def nearest(top: TopK) -> pa.Table | None:
            wider = replace(read, top=top)
            choice = choose(wider, settings(read.reference.relation))
            return None if choice.way == "scan" else candidates(wider, choice, vectors[top.measure.wanted.name])

        return text_search.search(read, planned, nearest)


def _ranked(prepared: Prepared, sources: Sources, vectors: Mapping[str, np.ndarray]) -> pa.Table | None:
    """The answer where found rows need only be put in order."""
    if (asked := prepared.ranked) is None:
        return None
    rows = sources.by_name[asked.name]
    return ranked.answer(asked, rows, vectors[asked.measure.wanted.name]) if isinstance(rows, pa.Table) else None


def open_table(
    path: str,
    version: str | int | None = store.LIVE,
    name: str | None = None,
    tables: Mapping[str, str | Sequence[str]] | None = None,
) -> Table:
    """A table for queries: its path (local or s3://), or a directory that holds exactly one table.

    version: a tag (`live`, `previous`), a number, or None for the newest, published or not; name: what SQL calls it;
    tables: Parquet, CSV and Lance paths by the name that SQL may join them under.
    Raises TableError if there is no such table or version.
    """
    uri = str(path).rstrip("/")
    return Table(uri if uri.endswith(".lance") else _only_table(uri), version, name, tables)


def _only_table(directory: str) -> str:
    from conjoin.pipeline import storage

    filesystem, root = storage.filesystem(directory)
    found = filesystem.ls(root, detail=False) if filesystem.isdir(root) else []
    names = sorted(n for n in map(posixpath.basename, found) if n.endswith(".lance") and "__quarantine" not in n)
    if len(names) != 1:
        what = f"{len(names)} tables here ({', '.join(names[:5])})" if names else "no table here"
        raise TableError(what, where=directory, next="Give the path of one table: <directory>/<name>.lance")
    return storage.join(directory, names[0])
