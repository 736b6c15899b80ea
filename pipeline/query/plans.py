"""Plans that are kept: a query that is asked again with other vectors or words is not parsed, resolved and checked.

Assumes: a plan depends on the query's text, its scalar parameters and the pinned version of its one table, and on no
more: a query that names anything else (frames, files, versions, a calibration, an encoder's labels) is planned
each time. Vectors, and words to look for, decide nothing in a plan but which of them are equal.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from conjoin.pipeline.query.parameters import Params, by_name, is_scalar, plain_value

if TYPE_CHECKING:
    import lance

    from conjoin.pipeline.query.prepared import Prepared

_KEPT = 200


class Plans:
    """The last ones used of one version of a table; safe to share between threads."""

    def __init__(self) -> None:
        self._dataset: lance.LanceDataset | None = None
        self._kept: OrderedDict[Hashable, Prepared] = OrderedDict()
        self._words: dict[str, frozenset[str]] = {}  # by query, of those that are kept
        self._lock = threading.Lock()

    def find(self, query: str, params: Params, dataset: lance.LanceDataset) -> Prepared | None:
        """With these parameters in it, None if the query has to be planned. A plan with functions of its own, whose
        names DuckDB knows them by, is lent to one asker at a time: `keep` brings it back."""
        with self._lock:
            if dataset is not self._dataset or query not in self._words:
                return None
            values = _others(params, self._words[query])
            key = _key(query, params, values)
            kept = self._kept.get(key)
            if kept is None:
                return None
            if kept.texts:
                del self._kept[key]
            else:
                self._kept.move_to_end(key)
        return _with(kept, values)

    def keep(self, query: str, params: Params, dataset: lance.LanceDataset, prepared: Prepared) -> None:
        """For the next time, if the same plan is right then."""
        if not prepared.repeatable or not _reads_only(prepared, dataset):
            return
        with self._lock:
            if dataset is not self._dataset:  # plans hold their version open
                self._kept.clear()
                self._words.clear()
                self._dataset = dataset
            if len(self._words) > _KEPT:
                self._words.clear()
            self._words[query] = prepared.words
            self._kept[_key(query, params, _others(params, prepared.words))] = prepared
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)


def _reads_only(prepared: Prepared, dataset: lance.LanceDataset) -> bool:
    """The handle, not its number, decides: it is opened anew where the tag has moved."""
    return all(read.reference.relation.dataset is dataset for read in prepared.reads)


def _others(params: Params, words: frozenset[str]) -> dict[str, object]:
    """Parameters that are no literals: lists, arrays, bytes, and texts among `words`."""
    found: dict[str, object] = {}
    for name, value in by_name(params).items():
        if isinstance(value, str) and name in words:
            found[name] = value
        elif not is_scalar(value):
            found[name] = plain_value(value, name)
    return found


def _key(query: str, params: Params, others: Mapping[str, object]) -> Hashable:
    scalars = [(name, type(value), repr(value)) for name, value in by_name(params).items() if name not in others]
    values = list(others.values())
    first_equal = [values.index(value) for value in values]
    sizes = [(type(value), len(value) if isinstance(value, list | bytes) else 0) for value in values]
    return query, tuple(scalars), tuple(others), tuple(first_equal), tuple(sizes)


def _with(prepared: Prepared, values: Mapping[str, object]) -> Prepared:
    named = {f"p{name}": value for name, value in values.items()}
    wanted = tuple(
        w if w.parameter is None else replace(w, value=named[w.parameter]) for w in prepared.rewritten.wanted
    )
    parameters = {name: named[name] for name in prepared.parameters}
    texts = {name: text.asked(named) for name, text in prepared.texts.items()}
    rewritten = replace(prepared.rewritten, wanted=wanted)
    return replace(prepared, parameters=parameters, rewritten=rewritten, texts=texts)
