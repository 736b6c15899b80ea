"""A plan in the making: what changed, and how much work that is; nothing durable is written until it is frozen.

Assumes: one draft at a time in a process; the comparison lies on disk and is gone when the block ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from conjoin.pipeline import hashes
from conjoin.pipeline import plan as plans
from conjoin.pipeline.comparison import Comparison, Question, comparing
from conjoin.pipeline.cutting import INSERTED, REWRITTEN, Cut, inserts, mask_of, rewrites
from conjoin.pipeline.layout import Change, change_of, lay_out, row_bytes
from conjoin.pipeline.progress import ShowProgress, silent
from conjoin.pipeline.quarantine import check_quarantine
from conjoin.pipeline.source import columns_of_files
from conjoin.pipeline.state import read_manifest
from conjoin.pipeline.store import (
    check_ours,
    columns_of_schema,
    live_version,
    open_version,
    restore,
    vector_columns,
)
from conjoin.pipeline.units import unit_rows

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.source import SourceFile
    from conjoin.pipeline.state import Manifest
    from conjoin.pipeline.survey import Survey


@dataclass(frozen=True, slots=True)
class Base:
    """What a plan builds on: the live version and its manifest, none of both where the whole table is made anew.

    head: the table as it is, None if there is no table.
    """

    head: lance.LanceDataset | None = None
    live: lance.LanceDataset | None = None
    manifest: Manifest | None = None

    @property
    def known(self) -> dict[str, SourceFile]:
        """Files of the live version by path."""
        return {} if self.manifest is None else {entry.file.path: entry.file for entry in self.manifest.files}


def base_of(uri: str, *, full: bool = False, restoring: bool = True) -> Base:
    """What a plan builds on; a head that is not the live version's content is restored to it first.

    full: nothing, the whole table is made anew; restoring: False leaves the head alone, to look only.
    Raises TableError for a table that is somebody else's.
    """
    head = check_ours(uri)
    check_quarantine(uri)
    if head is None or full or live_version(head) is None:
        return Base(head)
    if restoring:
        restore(uri)
    live = open_version(uri)
    manifest = read_manifest(live)
    return Base(open_version(uri, None), live if manifest else None, manifest)


@dataclass(frozen=True)  # no slots: cached_property needs a __dict__
class Draft:
    """anew: modalities whose vectors are all computed again; schema, change: of the table's columns."""

    catalog: Catalog
    found: Survey
    base: Base
    comparison: Comparison
    schema: pa.Schema
    change: Change
    thumbnail_px: int
    anew: tuple[str, ...]

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.comparison.question.modalities

    @property
    def kept(self) -> tuple[str, ...]:
        """Kept columns, as the table calls them."""
        return tuple(dict.fromkeys(self.catalog.source.keep))

    @cached_property
    def units(self) -> tuple[Cut, ...]:
        """All the work in order, without the rows."""
        rows = sum(file.num_rows for file in self.found.files)
        size = unit_rows(self.catalog.embed.unit_rows, rows, row_bytes(self.schema, self.thumbnail_px))
        return (*inserts(self, size), *rewrites(self))

    @property
    def embedded(self) -> int:
        """Rows that some tower looks at."""
        return sum(piece.rows for piece in self.units if piece.embed)

    def distinct(self, modality: str) -> int | None:
        """Different contents that a tower will see; None where only reading them tells."""
        selected = f"FROM rows WHERE {self._seen_by(modality)}"
        if self.base.manifest is None:
            return None
        if self._is_deep(modality) and _scalar(
            self.comparison, f"SELECT count(*) {selected} AND {modality}_hash IS NULL"
        ):
            return None
        return _scalar(self.comparison, f"SELECT count(DISTINCT {modality}_hash) {selected}")

    def addresses(self) -> int:
        """URIs that workers will fetch, equal ones of one night counted once where known."""
        contents = self.comparison.question.columns.contents
        uris = [m for m in self.modalities if contents[m] == "uri"]
        rows = {m: sum(piece.rows for piece in self.units if m in piece.embed) for m in uris}
        return sum(rows[m] if (known := self.distinct(m)) is None else min(known, rows[m]) for m in uris)

    def bytes_of_recalled(self) -> int:
        """About what workers read of files that planning left closed."""
        total = 0.0
        for number in self.comparison.files.recalled:
            file = self.found.files[number]
            sql = f"SELECT count(*) FROM rows WHERE file = {number} AND ({INSERTED} OR {REWRITTEN})"
            total += file.size_bytes * _scalar(self.comparison, sql) / max(file.num_rows, 1)
        return round(total)

    def _is_deep(self, modality: str) -> bool:
        return hashes.is_deep(self.catalog.source, self.comparison.question.columns.contents[modality])

    def _seen_by(self, modality: str) -> str:
        bit = 1 << self.modalities.index(modality)
        again = f" OR {REWRITTEN}" if modality in self.anew else ""
        return f"(({INSERTED} AND {mask_of(self)} & {bit} > 0){again})"

    def counts(self) -> dict[str, int]:
        """Rows by what becomes of them; of a modality that is computed anew `again`, of retries `due`."""
        counts = dict(self.comparison.counts)
        counts["skipped"] = sum(self.found.files[n].num_rows for n in self.comparison.files.skipped)
        for modality in self.modalities:
            sql = f"SELECT count(*) FROM rows WHERE kind = 'changed' AND changed_{modality}"
            counts[f"changed_{modality}"] = _scalar(self.comparison, sql)
        if self.anew:
            counts["again"] = _scalar(self.comparison, f"SELECT count(*) FROM rows WHERE {REWRITTEN}")
        due = self.comparison.question.due
        counts["due"] = 0 if due is None else due.num_rows
        return counts


@contextmanager
def drafting(
    catalog: Catalog,
    found: Survey,
    base: Base,
    due: pa.Table | None = None,
    limit: int | None = None,
    progress: ShowProgress = silent,
) -> Iterator[Draft]:
    """Compare the source with what `base` holds. due: (id, modality, file) of quarantined values to try again.

    limit: look at the first so many rows only, for a table that is made anew.
    Raises SourceError for ids that are null, repeated or of mixed types, TableError for columns that do not fit.
    """
    from conjoin.pipeline.survey import modalities_of

    manifest = base.manifest
    columns = columns_of_files(catalog.source, found.files, *_known_columns(manifest, found))
    modalities = modalities_of(catalog, found.spec)
    schema, thumbnail_px = lay_out(catalog, found, columns, base.head)
    anew = _anew(catalog, found, base, schema)
    change = Change() if base.live is None else change_of(base.live, schema, anew=bool(anew) and not _added(base, anew))
    question = Question(
        source=catalog.source,
        columns=columns,
        files=found.files,
        modalities=modalities,
        manifest=manifest,
        live=base.live,
        due=due,
        anew=anew,
        reread=manifest is not None and manifest.config != found.config,
        limit=limit,
    )
    with comparing(question, progress) as comparison:
        yield Draft(catalog, found, base, comparison, schema, change, thumbnail_px, anew)


def _known_columns(manifest: Manifest | None, found: Survey) -> tuple[pa.Schema | None, set[SourceFile]]:
    """Columns that the live version was read with, and the files that need no opening to know theirs."""
    if manifest is None or not manifest.columns or manifest.config != found.config:
        return None, set()
    return plans.schema_of_text(manifest.columns), {state.file for state in manifest.files}


def _anew(catalog: Catalog, found: Survey, base: Base, schema: pa.Schema) -> tuple[str, ...]:
    """Modalities that get new vectors for all rows: of another encoder all, else those that the table lacks."""
    if base.live is None or base.manifest is None:
        return ()
    before, after = vector_columns(base.live), columns_of_schema(schema)
    same = base.manifest.fingerprint == found.fingerprint and base.manifest.precision == catalog.embed.precision
    kinds = all(base.live.schema.field(n).type == schema.field(n).type for n in after if n in before)
    wanted = [name for name in after if name not in before] if same and kinds else list(after)
    return tuple(name.removesuffix("_vec") for name in wanted)


def _added(base: Base, anew: Sequence[str]) -> bool:
    """Whether the modalities that are computed anew are only those that the table lacks."""
    assert base.live is not None
    return not any(f"{modality}_vec" in base.live.schema.names for modality in anew)


def _scalar(comparison: Comparison, sql: str) -> int:
    row = comparison.connection.execute(sql).fetchone()
    assert row is not None
    return int(row[0])
