"""Plans that are kept: a query that is asked again with other vectors is not parsed, resolved and checked again.

Assumes: a plan depends on the query's text, its scalar parameters and the pinned version of its one table, and on no
more: a query that names anything else (frames, files, versions, a calibration, an encoder's labels) is planned
each time. Vectors decide nothing in a plan but which of them are equal.
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
        self._lock = threading.Lock()

    def find(self, query: str, params: Params, dataset: lance.LanceDataset) -> Prepared | None:
        """With these parameters in it, None if the query has to be planned."""
        values = _others(params)
        key = _key(query, params, values)
        with self._lock:
            kept = self._kept.get(key) if dataset is self._dataset else None
            if kept is None:
                return None
            self._kept.move_to_end(key)
        return _with(kept, values)

    def keep(self, query: str, params: Params, dataset: lance.LanceDataset, prepared: Prepared) -> None:
        """For the next time, if the same plan is right then."""
        if not prepared.repeatable or not _reads_only(prepared, dataset):
            return
        with self._lock:
            if dataset is not self._dataset:  # plans hold their version open
                self._kept.clear()
                self._dataset = dataset
            self._kept[_key(query, params, _others(params))] = prepared
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)


def _reads_only(prepared: Prepared, dataset: lance.LanceDataset) -> bool:
    """The handle, not its number, decides: it is opened anew where the tag has moved."""
    return all(read.reference.relation.dataset is dataset for read in prepared.reads)


def _others(params: Params) -> dict[str, object]:
    """Parameters that are no literals: lists, arrays, bytes."""
    return {name: plain_value(value, name) for name, value in by_name(params).items() if not is_scalar(value)}


def _key(query: str, params: Params, others: Mapping[str, object]) -> Hashable:
    scalars = [(name, type(value), repr(value)) for name, value in by_name(params).items() if name not in others]
    values = list(others.values())
    first_equal = [values.index(value) for value in values]
    sizes = [(type(value), len(value)) for value in values if isinstance(value, list | bytes)]
    return query, tuple(scalars), tuple(others), tuple(first_equal), tuple(sizes)


def _with(prepared: Prepared, values: Mapping[str, object]) -> Prepared:
    named = {f"p{name}": value for name, value in values.items()}
    wanted = tuple(
        w if w.parameter is None else replace(w, value=named[w.parameter]) for w in prepared.rewritten.wanted
    )
    parameters = {name: named[name] for name in prepared.parameters}
    return replace(prepared, parameters=parameters, rewritten=replace(prepared.rewritten, wanted=wanted))
