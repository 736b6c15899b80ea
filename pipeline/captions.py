"""Texts of training rows, read here without Ray: for a tokenizer to learn from, and how often they repeat.

Assumes: only the text's columns are read; what Ray's workers read of the same rows is pipeline/steps.py's matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from conjoin.pipeline.features import items_of, reading_units

if TYPE_CHECKING:
    from conjoin.pipeline.order import Positions
    from conjoin.pipeline.selection import Selection

_CHECKED_ROWS = 200_000


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Facts of the training rows: what masks nothing but repeats makes false negatives.

    checked: rows whose text was read; repeated: share of those with a text that another row also has; apart: share
    whose text a row of another group has, which no mask of groups covers.
    """

    rows: int
    groups: int
    checked: int
    repeated: float
    apart: float

    @property
    def is_sampled(self) -> bool:
        """Shares of a sample are too low: repeats outside it are not seen."""
        return self.checked < self.rows

    def lines(self) -> list[str]:
        """For people."""
        of = f"of {self.checked:,} rows in random row groups" if self.is_sampled else f"of {self.rows:,} rows"
        return [
            f"{self.rows:,} training rows in {self.groups:,} groups",
            f"texts that repeat: {self.repeated:.1%} {of}; in other groups: {self.apart:.1%}",
        ]


def captions(rows: Selection, most: int) -> list[str]:
    """The texts of up to `most` rows, the first of each part in proportion to its size."""
    first = rows.interleaved().taken(np.arange(min(most, len(rows))))
    return [item for _, items in _texts(first, np.arange(len(first))) for item in items if isinstance(item, str)]


def duplicates(rows: Selection, most: int = _CHECKED_ROWS, seed: int = 0) -> Duplicates:
    """Counts groups and repeated texts; of more than `most` rows, in random row groups of about so many."""
    from conjoin.pipeline.source import content_hash

    groups_of: dict[bytes, set[int]] = {}
    times: Counter[bytes] = Counter()
    hashes_N: list[tuple[int, set[bytes]]] = []
    wanted = _sample(rows, most, seed)
    for position, items in _texts(rows, wanted):
        hashes = {content_hash(item) for item in items}
        group = int(rows.group_N[position])
        hashes_N.append((group, hashes))
        times.update(hashes)
        for found in hashes:
            groups_of.setdefault(found, set()).add(group)
    with_text = max(sum(1 for _, hashes in hashes_N if hashes), 1)
    repeated = sum(any(times[found] > 1 for found in hashes) for _, hashes in hashes_N)
    apart = sum(any(len(groups_of[found]) > 1 for found in hashes) for _, hashes in hashes_N)
    groups = len(np.unique(rows.group_N))
    return Duplicates(len(rows), groups, len(wanted), repeated / with_text, apart / with_text)


def _sample(rows: Selection, most: int, seed: int) -> Positions:
    """All positions, or those of random row groups; of the last one only as many as are left."""
    if len(rows) <= most:
        return np.arange(len(rows))
    reading = rows.reading
    order = np.random.default_rng(seed).permutation(int(reading.max()) + 1)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return np.argsort(place[reading], kind="stable")[:most]


def _texts(rows: Selection, wanted: Positions) -> Iterator[tuple[int, list[object]]]:
    """(position, its texts) of the rows whose part has texts."""
    from conjoin.pipeline.source import columns_of, python_values, read_rows, values_of

    for unit in reading_units(rows, wanted):
        source = rows.sources[int(str(unit["source"]))]
        if "text" not in source.modalities:
            continue
        where = str(unit["file"]), int(str(unit["row_group"]))
        table = read_rows(source, *where, columns_of(source, "text"), np.array(unit["rows"]))
        values = python_values(values_of(source, table, "text"))
        yield from zip(np.array(unit["position"]).tolist(), map(items_of, values), strict=True)
