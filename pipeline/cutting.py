"""A night's work cut into units: which rows become new fragments, which are rewritten in place.

Assumes: `rows` is the comparison's table; units follow the order of the source, so equal drafts are cut alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conjoin.pipeline.units import INSERT, REWRITE, cut

if TYPE_CHECKING:
    from conjoin.pipeline.draft import Draft

# SQL: what becomes of a row of the comparison.
INSERTED = "(kind IN ('new', 'changed') OR (retold AND address IS NULL))"
REWRITTEN = "(address IS NOT NULL AND kind NOT IN ('new', 'changed') AND (retold OR kind = 'kept'))"


@dataclass(frozen=True, slots=True)
class Cut:
    """A unit without its rows. where: SQL that selects the rows of its kind, in their order; rows: how many."""

    operation: str
    rows: int
    where: str
    embed: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    fragment: int = -1


def mask_of(draft: Draft) -> str:
    """SQL: a bit per modality whose tower runs for an inserted row."""
    whole = (1 << len(draft.modalities)) - 1
    bits = [f"(CASE WHEN changed_{m} THEN {1 << bit} ELSE 0 END)" for bit, m in enumerate(draft.modalities)]
    again = sum(1 << bit for bit, m in enumerate(draft.modalities) if m in draft.anew)
    return f"(CASE WHEN kind = 'new' OR address IS NULL THEN {whole} ELSE ({' + '.join(bits)}) | {again} END)"


def inserts(draft: Draft, size: int) -> Iterator[Cut]:
    """Units of new and changed rows, alike in the towers that run. size: rows of one at most."""
    mask = mask_of(draft)
    by = "mask, file, row_group"
    sql = f"SELECT {mask} AS mask, count(*) FROM rows WHERE {INSERTED} GROUP BY {by} ORDER BY {by}"
    groups: dict[int, list[int]] = {}
    for number, count in draft.comparison.connection.execute(sql).fetchall():
        groups.setdefault(int(number), []).append(int(count))
    for number, sizes in groups.items():
        embed = tuple(m for bit, m in enumerate(draft.modalities) if number >> bit & 1)
        where = f"{INSERTED} AND {mask} = {number} ORDER BY file, row_group, row"
        yield from (Cut(INSERT, rows, where, embed) for rows in cut(sizes, size))


def rewrites(draft: Draft) -> Iterator[Cut]:
    """One unit per fragment: all its rows for a new encoder, else the rows whose kept columns changed."""
    sql = (
        f"SELECT address >> 32 AS fragment, count(*), count(*) FILTER (kind = 'kept') FROM rows WHERE {REWRITTEN} "
        "GROUP BY fragment ORDER BY fragment"
    )
    again = [f"{modality}_vec" for modality in draft.anew]
    added = [name for name in draft.change.added if name in draft.schema.names and name not in draft.kept]
    for fragment, count, num_kept in draft.comparison.connection.execute(sql).fetchall():
        columns = dict.fromkeys([*again, *added, *(draft.kept if num_kept else ())])
        where = f"{REWRITTEN} ORDER BY address >> 32, file, row_group, row"
        yield Cut(REWRITE, int(count), where, draft.anew, tuple(columns), int(fragment))
