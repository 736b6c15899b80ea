"""The nearest rows of a Lance table to many vectors at once: by one product of matrices, or by a batch of the index.

A product reads all vectors once and costs 0.5 ms a query at 100,000 rows of 256 dimensions on two cores, which no index
beats below some hundred thousand rows; its answer is exact. A batched index search cannot refine, so that more
candidates are fetched and ranked here by exact distances.

Assumes: a vector that is null, NaN or zero has no place in an order: such rows only fill up a LIMIT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.index import Setting
from conjoin.pipeline.query.relations import Relation, projection

_EXACT_FLOATS = 100_000_000  # rows x dimensions up to which the product is quicker than an index
_MOST_PRODUCTS = 4e13  # multiplications; some minutes on a few cores
_MOST_PAIRS = 20_000_000
_BLOCK_ROWS, _BLOCK_QUERIES, _BATCH = 8_192, 1_024, 256
_ROUNDING = 1e-5
_OVERFETCH = 5
_FIRST = 64  # rows that a radius begins with
KEY = "__near"  # the column that says which vector a row is near to


@dataclass(frozen=True, slots=True)
class Wanted:
    """need: rows for each vector, 0 for all within the radius (a cosine distance). ties: with equals of the last.

    descending: by similarity, where DuckDB puts NaN first.
    """

    column: str
    filter: str | None
    need: int
    radius: float
    ties: bool
    descending: bool


@dataclass(slots=True)
class _Unusable:
    """Ids of rows whose vector is NaN or zero, and of those that have none."""

    nan: list[np.ndarray] = field(default_factory=list)
    null: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pairs:
    """query: number of the vector; address: Lance's id of a row near to it; both (P,). exact: no index was used."""

    query: np.ndarray
    address: np.ndarray
    exact: bool


def unit_rows(values: pa.ChunkedArray | pa.Array, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((N, D) float32 of unit length, zeros where unusable; (N,) usable; (N,) not null)."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    there_N = np.asarray(array.is_valid())
    found_ND = np.zeros((len(array), dim), np.float32)
    if there_N.any():
        flat = array.drop_null().flatten().to_numpy(zero_copy_only=False)
        found_ND[there_N] = flat.reshape(-1, dim)
    norms_N = np.sqrt(np.einsum("nd,nd->n", found_ND, found_ND))
    usable_N = there_N & np.isfinite(norms_N) & (norms_N > 0)
    found_ND[~usable_N] = 0
    found_ND[usable_N] /= norms_N[usable_N, None]
    return found_ND, usable_N, there_N


def find(
    relation: Relation, wanted: Wanted, queries_QD: np.ndarray, usable_Q: np.ndarray, setting: Setting | None
) -> Pairs:
    """setting: of an index that holds every row; None for an exact answer. Raises QueryError for too much work."""
    rows, dim = relation.count(wanted.filter), queries_QD.shape[1]
    if setting is None or rows * dim <= _EXACT_FLOATS or not usable_Q.all():
        return _product(relation, wanted, queries_QD, usable_Q)
    found = _by_index(relation, wanted, queries_QD, setting)
    short_Q = ~found.complete_Q
    if not short_Q.any():
        return Pairs(found.query, found.address, False)
    rest = _product(relation, wanted, queries_QD[short_Q], usable_Q[short_Q])
    keep = ~short_Q[found.query]
    query = np.concatenate([found.query[keep], np.flatnonzero(short_Q)[rest.query]])
    return Pairs(query, np.concatenate([found.address[keep], rest.address]), False)


def _product(relation: Relation, wanted: Wanted, queries_QD: np.ndarray, usable_Q: np.ndarray) -> Pairs:
    rows, dim = relation.count(wanted.filter), queries_QD.shape[1]
    if len(queries_QD) * rows * dim > _MOST_PRODUCTS:
        minutes = len(queries_QD) * rows * dim / 3e12
        raise QueryError(
            f"this compares {len(queries_QD):,} vectors with {rows:,} rows: about {minutes:,.0f} minutes on two cores",
            next="Narrow one side with WHERE, or let the night index the table",
        )
    best, unusable = _Best(wanted, len(queries_QD)), _Unusable()
    for vectors_BD, address_B in _blocks(relation, wanted, dim, unusable):
        for start in range(0, len(queries_QD), _BLOCK_QUERIES):
            some = np.flatnonzero(usable_Q[start : start + _BLOCK_QUERIES]) + start
            if len(some):
                best.take(some, queries_QD[some] @ vectors_BD.T, address_B)
        best.settle()
    return _filled(relation, wanted, best, unusable, usable_Q)


def _blocks(
    relation: Relation, wanted: Wanted, dim: int, unusable: _Unusable
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(unit vectors, addresses) of the usable rows that pass the filter."""
    assert relation.dataset is not None
    scanner = relation.dataset.scanner(
        columns=projection(relation, [wanted.column]),
        filter=wanted.filter,
        with_row_id=True,
        batch_size=_BLOCK_ROWS,
    )
    for batch in scanner.to_batches():
        vectors_BD, usable_B, there_B = unit_rows(batch.column(wanted.column), dim)
        address_B = batch.column("_rowid").to_numpy()
        if wanted.need:
            unusable.nan.append(address_B[there_B & ~usable_B])
            unusable.null.append(address_B[~there_B])
        yield vectors_BD[usable_B], address_B[usable_B]


class _Best:
    """The pairs so far: of a top-k those that may still be in it, of a radius all within it."""

    def __init__(self, wanted: Wanted, num_queries: int) -> None:
        self._wanted = wanted
        self._slack = _ROUNDING if wanted.ties or not wanted.need else 0.0
        floor = -math.inf if wanted.need else 1.0 - wanted.radius
        self._least_Q = np.full(num_queries, floor, np.float32)
        self._fresh: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.query, self.address = np.zeros(0, np.int64), np.zeros(0, np.uint64)
        self._similarity = np.zeros(0, np.float32)

    def take(self, queries: np.ndarray, similar_SB: np.ndarray, address_B: np.ndarray) -> None:
        need, least_S = self._wanted.need, self._least_Q[queries]
        if need and similar_SB.shape[1] > need and np.isneginf(least_S).any():
            least_S = np.maximum(least_S, np.partition(similar_SB, -need, axis=1)[:, -need])
        at = np.flatnonzero(
            similar_SB >= (least_S - self._slack)[:, None]
        )  # four times as quick as two indices at once
        at_S, at_B = np.divmod(at, similar_SB.shape[1])
        self._fresh.append((queries[at_S], address_B[at_B], similar_SB[at_S, at_B]))
        if len(self.query) + sum(len(fresh[0]) for fresh in self._fresh) > _MOST_PAIRS:
            self.settle()
            if len(self.query) > _MOST_PAIRS:
                raise QueryError(
                    f"more than {_MOST_PAIRS:,} pairs are this near to each other",
                    next="Take a smaller radius, or narrow one side with WHERE",
                )

    def settle(self) -> None:
        """Drop what is no longer among the nearest."""
        fresh, self._fresh = self._fresh, []
        if not fresh:
            return
        parts = [(self.query, self.address, self._similarity), *fresh]
        query, address, similar = (np.concatenate([part[i] for part in parts]) for i in range(3))
        if not self._wanted.need:
            self.query, self.address, self._similarity = query, address, similar
            return
        order = np.lexsort((-similar, query))
        query, address, similar = query[order], address[order], similar[order]
        starts = np.flatnonzero(np.r_[True, query[1:] != query[:-1]]) if len(query) else np.zeros(0, np.int64)
        lengths = np.diff(np.r_[starts, len(query)])
        full = lengths >= self._wanted.need
        self._least_Q[query[starts[full]]] = similar[starts[full] + self._wanted.need - 1]
        rank = np.arange(len(query)) - np.repeat(starts, lengths)
        keep = (rank < self._wanted.need) | (
            similar >= self._least_Q[query] - self._slack if self._wanted.ties else False
        )
        self.query, self.address, self._similarity = query[keep], address[keep], similar[keep]


def _filled(relation: Relation, wanted: Wanted, best: _Best, unusable: _Unusable, usable_Q: np.ndarray) -> Pairs:
    """With the rows that fill up a LIMIT where there are too few near ones, and for vectors that nothing is near to."""
    if not wanted.need:
        return Pairs(best.query, best.address, True)
    nan, null = (np.concatenate([np.zeros(0, np.uint64), *found]) for found in (unusable.nan, unusable.null))
    most = None if wanted.ties else wanted.need
    counts = np.bincount(best.query, minlength=len(usable_Q))
    more: list[tuple[int, np.ndarray]] = []
    for query in np.flatnonzero((counts < wanted.need) & usable_Q).tolist():
        more.append((query, np.concatenate([nan, null])[:most]))
    if wanted.descending and len(nan):
        more += [(query, nan[:most]) for query in np.flatnonzero((counts >= wanted.need) & usable_Q).tolist()]
    if not usable_Q.all():
        assert relation.dataset is not None
        any_rows = relation.dataset.to_table(columns=[], filter=wanted.filter, limit=most, with_row_id=True)
        address = any_rows["_rowid"].to_numpy().astype(np.uint64)
        more += [(query, address) for query in np.flatnonzero(~usable_Q).tolist()]
    if sum(len(found) for _, found in more) > _MOST_PAIRS:
        raise QueryError(
            f"rows without a vector make more than {_MOST_PAIRS:,} pairs",
            next=f"Leave them out: WHERE {wanted.column} IS NOT NULL, on both sides",
        )
    query_P = np.concatenate([best.query, *(np.full(len(found), query) for query, found in more)])
    return Pairs(query_P, np.concatenate([best.address, *(found for _, found in more)]), True)


@dataclass(frozen=True, slots=True)
class _Indexed:
    query: np.ndarray
    address: np.ndarray
    complete_Q: np.ndarray


def _by_index(relation: Relation, wanted: Wanted, queries_QD: np.ndarray, setting: Setting) -> _Indexed:
    """complete_Q: which vectors got all they need."""
    rows, total = relation.count(wanted.filter), relation.count()
    trusted = wanted.need or _FIRST
    query, address, complete_Q = [], [], np.zeros(len(queries_QD), bool)
    for start in range(0, len(queries_QD), _BATCH):
        some = np.arange(start, min(start + _BATCH, len(queries_QD)))
        fetch = trusted * max(_OVERFETCH, setting.refine)
        while len(some) and fetch < rows // 2:
            found = _searched(relation, wanted, queries_QD[some], setting, fetch, rows / max(total, 1))
            done = np.zeros(len(some), bool)
            for at, (near_K, similar_K) in enumerate(found):
                order = np.argsort(-similar_K)
                near_K, similar_K = near_K[order], similar_K[order]
                sure = len(similar_K) // max(_OVERFETCH, setting.refine)  # nearer ones are all there
                if wanted.need:
                    done[at] = len(similar_K) >= wanted.need
                    least = similar_K[wanted.need - 1] if done[at] else -math.inf
                    keep = similar_K >= least if not wanted.ties else similar_K >= least - _ROUNDING
                else:
                    edge = 1.0 - wanted.radius - _ROUNDING
                    done[at] = len(similar_K) >= fetch and similar_K[max(sure - 1, 0)] < edge
                    keep = similar_K >= edge
                if done[at]:
                    query.append(np.full(keep.sum(), some[at]))
                    address.append(near_K[keep])
            complete_Q[some[done]] = True
            if wanted.need:
                break
            some, fetch = some[~done], fetch * 4
    none = np.zeros(0, np.int64)
    return _Indexed(np.concatenate([none, *query]), np.concatenate([none.astype(np.uint64), *address]), complete_Q)


def _searched(
    relation: Relation, wanted: Wanted, queries_QD: np.ndarray, setting: Setting, fetch: int, share: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(addresses, exact cosine similarities) of each vector's candidates, in rough order."""
    assert relation.dataset is not None
    probes = setting.nprobes * math.sqrt(max(fetch / (10 * max(_OVERFETCH, setting.refine)), 1)) / math.sqrt(share)
    nprobes = min(math.ceil(probes), setting.num_partitions)
    query: dict[str, object] = {"column": wanted.column, "q": queries_QD, "k": fetch, "metric": "cosine"}
    query |= {"minimum_nprobes": nprobes} | ({} if wanted.filter else {"maximum_nprobes": nprobes})
    columns = {**projection(relation, [wanted.column]), "_distance": "_distance", "query_index": "query_index"}
    found = relation.dataset.to_table(
        columns=columns, nearest=query, filter=wanted.filter, prefilter=True, with_row_id=True
    )
    vectors_ND, usable_N, _ = unit_rows(found[wanted.column], queries_QD.shape[1])
    number_N, address_N = found["query_index"].to_numpy(), found["_rowid"].to_numpy()
    similar_N = np.einsum("nd,nd->n", vectors_ND, queries_QD[number_N])
    picks = [np.flatnonzero((number_N == query) & usable_N) for query in range(len(queries_QD))]
    return [(address_N[pick].astype(np.uint64), similar_N[pick]) for pick in picks]


@dataclass(frozen=True, slots=True)
class Joined:
    """What DuckDB reads as one table: pairs (key, ROW) of rows (..., ROW) that may be near to several vectors."""

    pairs: pa.Table
    rows: pa.Table


ROW = "__row"


def joined(relation: Relation, columns: Sequence[str], pairs: Pairs, keys: pa.ChunkedArray) -> Joined:
    """keys: by number of the vector; two of the same have their rows once."""
    assert relation.dataset is not None
    addresses, row_P = np.unique(pairs.address, return_inverse=True)
    known, number_P = keys.combine_chunks(), pairs.query
    if not pa.types.is_fixed_size_list(known.type):  # a vector is its own key: those are distinct
        encoded = known.dictionary_encode(null_encoding="encode")
        known, number_P = encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False)[pairs.query]
    both = np.unique(number_P.astype(np.int64) * max(len(addresses), 1) + row_P)
    number_P, row_P = both // max(len(addresses), 1), both % max(len(addresses), 1)
    taken = [
        relation.dataset._take_rows(addresses[start : start + _TAKEN].tolist(), columns=projection(relation, columns))
        for start in range(0, max(len(addresses), 1), _TAKEN)
    ]
    rows = pa.concat_tables(taken)
    key_P = known.take(pa.array(number_P))
    return Joined(
        pa.table({KEY: key_P, ROW: pa.array(row_P, pa.int64())}),
        rows.append_column(ROW, pa.array(np.arange(rows.num_rows), pa.int64())),
    )


_TAKEN = 50_000
