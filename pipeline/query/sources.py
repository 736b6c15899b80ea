"""What DuckDB reads for every table of one query: scans, candidates of searches, frames; narrowed by keys on the way.

Assumes: one Sources per answer. A table is read once, inner ones before those that need their keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from conjoin.pipeline.index import incomplete
from conjoin.pipeline.query.keys import MOST_KEYS, KeySet, as_filter, is_worth
from conjoin.pipeline.query.pairs import KEY, Joined, Wanted, find, joined, unit_rows
from conjoin.pipeline.query.search import Choice, candidates, choose, grown, inside, scan

if TYPE_CHECKING:
    from conjoin.pipeline.index import Setting
    from conjoin.pipeline.query.expressions import EmbeddedColumn
    from conjoin.pipeline.query.neighbours import Near
    from conjoin.pipeline.query.planner import Read
    from conjoin.pipeline.query.questions import Question
    from conjoin.pipeline.query.relations import Relation

# Tables of fewer rows are read whole rather than narrowed by keys.
_LARGE = 5_000
# Rows that are looked through for keys.
_MOST_PARTNERS = 100_000
Ask = Callable[["Question", Mapping[str, object]], pa.Table]
Embed = Callable[["EmbeddedColumn", list[str | None]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Gathered:
    """How a read was done. read: with the keys in its filter; keys: how many, by where they come from.

    rows: delivered to DuckDB, None for a scan, whose rows nobody counts; searched: whether candidates answered.
    """

    read: Read
    choice: Choice | None
    keys: Mapping[str, int]
    rows: int | None
    searched: bool


class Sources:
    """by_name: what DuckDB reads, by the table's name in it; gathered: how that came about."""

    def __init__(
        self,
        reads: tuple[Read, ...],
        questions: Mapping[tuple[str, int], Question],
        vectors: Mapping[str, np.ndarray],
        settings: Callable[[Relation], Mapping[str, Setting]],
        ask: Ask,
        embed: Embed,
    ) -> None:
        """questions: by the name of a table and the number of its key set, -1 for the outcome of a growth, -2 for what
        neighbours are looked for; settings: of a table's indexes, none for an exact answer; embed: values of a column.
        """
        self._reads = {read.reference.name: read for read in reads}
        self._questions, self._vectors, self._settings = questions, vectors, settings
        self._ask, self._embed = ask, embed
        self._begun: set[str] = set()
        self.by_name: dict[str, object] = {}
        self.gathered: dict[str, Gathered] = {}

    def put(self, name: str, rows: pa.Table) -> None:
        """Rows that something else found."""
        self._begun.add(name)
        self.by_name[name] = rows
        self.gathered[name] = Gathered(self._reads[name], None, {}, rows.num_rows, True)

    def gather(self) -> dict[str, object]:
        for name in self._reads:
            self._read(name)
        return self.by_name

    def distances(self, question: Question) -> np.ndarray:
        """Sorted; what a question about distances says of all that was read."""
        return _finite(self._asked(question, {}))

    def _read(self, name: str) -> None:
        if name in self._begun:
            return
        self._begun.add(name)
        read = self._reads[name]
        if read.reference.relation.dataset is None:
            self.by_name[name] = scan(read)
            self.gathered[name] = Gathered(read, None, {}, None, False)
            return
        if read.near is not None:
            self.by_name[name] = near = self._neighbours(read, read.near)
            self.gathered[name] = Gathered(read, None, {}, near.pairs.num_rows, True)
            return
        read, keys = self._narrowed(read)
        choice = choose(read, self._settings(read.reference.relation) if read.measure else {})
        found = None if choice.way == "scan" else self._search(read, choice)
        self.by_name[name] = scan(read, choice) if found is None else found
        rows = None if found is None else found.num_rows
        self.gathered[name] = Gathered(read, choice, keys, rows, found is not None)

    def _neighbours(self, read: Read, near: Near) -> Joined:
        """The rows near to each vector that the rest of the query gives."""
        relation, column = read.reference.relation, near.pair.column
        asked = self._asked(self._questions[read.reference.name, -2], {})
        if near.pair.embedded is not None:
            found_ND, usable_N = self._embed(near.pair.embedded[0], asked[KEY].to_pylist())
        else:
            found_ND, usable_N, _ = unit_rows(asked["__vector"], column.dim)
        setting = self._settings(relation).get(column.name)
        assert relation.dataset is not None
        if setting is not None and incomplete(relation.dataset):
            setting = None  # a batch puts rough distances of indexed rows beside exact ones of the others
        descending = near.pair.similarity
        wanted = Wanted(column.name, read.filter, near.need, near.radius, near.ties, descending)
        return joined(relation, read.columns, find(relation, wanted, found_ND, usable_N, setting), asked[KEY])

    def _search(self, read: Read, choice: Choice) -> pa.Table | None:
        assert read.measure is not None
        vector = self._vectors[read.measure.wanted.name]
        if read.top is not None:
            return candidates(read, choice, vector)
        if read.within is not None:
            return inside(read, choice, vector)
        name = read.reference.name
        question = self._questions[name, -1]

        def outcome(rows: pa.Table) -> np.ndarray:
            return _finite(self._asked(question, {name: rows}))

        return grown(read, choice, vector, outcome)

    def _narrowed(self, read: Read) -> tuple[Read, dict[str, int]]:
        """With keys in its filter where they are few; how many, by where they come from."""
        dataset, counts = read.reference.relation.dataset, dict[str, int]()
        assert dataset is not None
        if not read.keys or read.reference.relation.count() < _LARGE:
            return read, counts
        for number, keys in enumerate(read.keys):
            question = self._questions[read.reference.name, number]
            if not self._can_ask(keys, question):
                continue
            values = self._asked(question, {}).column(0).combine_chunks()
            condition = None
            if len(values) <= MOST_KEYS and is_worth(len(values), read.reference.relation.count()):
                condition = as_filter(keys.column, dataset.schema.field(keys.column).type, values)
            if condition is not None:
                both = f"{read.filter} AND {condition}" if read.filter else condition
                read, counts[keys.source] = replace(read, filter=both), len(values)
        return read, counts

    def _can_ask(self, keys: KeySet, question: Question) -> bool:
        """Whether the keys come from rows that are all read, and few; those are read now."""
        partner = keys.partner
        if partner is not None:
            read = self._reads[partner.name]
            if read.top is not None or read.growth is not None:
                return False
        if sum(self._size(self._reads[name]) for name in question.tables if name in self._reads) > _MOST_PARTNERS:
            return False
        for name in question.tables & self._reads.keys():
            self._read(name)
        return all(name in self.by_name for name in question.tables & self._reads.keys())

    def _size(self, read: Read) -> float:
        """Rows, about, that a read delivers."""
        relation = read.reference.relation
        if read.top is not None:
            return read.top.need
        if relation.dataset is not None:
            return relation.count(read.filter)
        return relation.frame.num_rows if isinstance(relation.frame, pa.Table) else math.inf

    def _asked(self, question: Question, more: Mapping[str, object]) -> pa.Table:
        for name in question.tables - more.keys():
            if name in self._reads:
                self._read(name)
        known = {**self.by_name, **more}
        return self._ask(question, {name: known[name] for name in question.tables if name in known})


def _finite(found: pa.Table) -> np.ndarray:
    values = found.column(0).drop_null().to_numpy()
    return np.sort(values[np.isfinite(values)])
