"""Gates: what must hold before readers see a version; each says its numbers, and what to do, in a sentence.

Assumes: a candidate is compared with what is live; no gate scans the table: they read metadata, what changed, fixed
samples, and what measures.py keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from conjoin.pipeline import store
from conjoin.pipeline.errors import GateError
from conjoin.pipeline.section import Section

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

    from conjoin.pipeline.catalog import Catalog

_LOOKED_UP = 200


class Gates(Section):
    """What must hold before readers see a version."""

    row_change: float = Field(0.05, ge=0, description="largest relative change of the row count against live")
    duplicate_vectors: float = Field(
        0.5, ge=0, le=1, description="largest share of vectors that equal another one of different content"
    )
    quarantine: float = Field(0.01, ge=0, le=1, description="largest share of records with a value in quarantine")
    centroid_shift: float = Field(
        0.05, ge=0, le=2, description="largest 1 - cosine between the mean vectors of live and tonight, same encoder"
    )
    reembedded: float = Field(
        0.02, ge=0, le=1, description="largest share of sampled unchanged rows that embed to something else than stored"
    )
    hit_at_10_drop: float = Field(
        0.01, ge=0, le=1, description="largest loss of hit@10 against live: held-out records, golden queries"
    )
    golden: str | None = Field(None, description="CSV with columns query, expected (ids separated by |), column")


@dataclass(frozen=True, slots=True)
class Expected:
    """What the plan promised. fingerprint: of the encoder of every vector column; columns: their names.

    added, deleted: ids that live lacks, ids that only live has; None: not known. quarantined: records with a value in
    quarantine, of all that this version came from.
    """

    num_rows: int
    fingerprint: str
    columns: tuple[str, ...]
    added: int | None = None
    deleted: int | None = None
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate: what was found, in one sentence with its numbers; advice: what to do where it failed.

    value, limit: the figure and how far it may go, where a gate is about one.
    """

    name: str
    passed: bool
    detail: str
    advice: str = ""
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What gates look at. catalog: None where neither source nor encoder may be asked."""

    dataset: lance.LanceDataset
    expected: Expected
    gates: Gates
    live: lance.LanceDataset | None = None
    catalog: Catalog | None = None

    @property
    def columns(self) -> dict[str, store.VectorColumn]:
        """Tonight's vector columns by modality: a new encoder's where it stands beside the old one's."""
        found = store.vector_columns(self.dataset)
        later = {name: column for name, column in found.items() if name.endswith(store.NEXT)}
        return {column.modality: column for column in (*found.values(), *later.values())}


def check_gates(
    candidate: lance.LanceDataset,
    expected: Expected,
    gates: Gates,
    live: lance.LanceDataset | None = None,
    catalog: Catalog | None = None,
) -> tuple[GateResult, ...]:
    """Every gate that needs no index, on a candidate; live: what it is compared with, None on the first night.

    catalog: for gates that ask the source and the encoder, which loads torch. Raises GateError naming every failed gate
    with its numbers; all results are attached to it.
    """
    from conjoin.pipeline import quality, reembedded

    subject = Subject(candidate, expected, gates, live, catalog)
    results = [*_table_gates(subject), *quality.vector_gates(subject), *reembedded.gates(subject)]
    return _judged(candidate, results)


def check_indexed(
    head: lance.LanceDataset,
    expected: Expected,
    gates: Gates,
    catalog: Catalog,
    live: lance.LanceDataset | None = None,
    earlier: Sequence[GateResult] = (),
) -> tuple[GateResult, ...]:
    """Every gate on an indexed head. earlier: results of its candidate, whose gates about vectors are not repeated.

    Raises GateError as check_gates does.
    """
    from conjoin.pipeline import golden, quality, reembedded

    subject = Subject(head, expected, gates, live, catalog)
    results = [*_table_gates(subject), *_head_gates(subject), *_index_gates(subject)]
    if not earlier:
        results += quality.vector_gates(subject)
    if not any(result.name.startswith(reembedded.NAME) for result in earlier):
        results += reembedded.gates(subject)
    results += golden.gates(subject)
    kept = [result for result in earlier if result.name not in {found.name for found in results}]
    return _judged(head, [*kept, *results])


def _judged(dataset: lance.LanceDataset, results: Sequence[GateResult]) -> tuple[GateResult, ...]:
    failed = [result for result in results if not result.passed]
    if failed:
        advice = " ".join(dict.fromkeys(f"{result.advice}." for result in failed if result.advice))
        meant = "If the change is meant, raise the gate in the run file and run again"
        raise GateError(
            "; ".join(f"{result.name}: {result.detail}" for result in failed),
            where=f"{dataset.uri} version {dataset.version}",
            next=f"Nothing was published and readers see what they saw before. {advice} {meant}".replace("  ", " "),
            results=tuple(results),
        )
    return tuple(results)


def _table_gates(subject: Subject) -> list[GateResult]:
    return [*_row_gates(subject), *_id_gates(subject), _quarantine_gate(subject), *_column_gates(subject)]


def _row_gates(subject: Subject) -> list[GateResult]:
    """Row counts are in the metadata."""
    expected, found = subject.expected, subject.dataset.count_rows()
    results = [
        GateResult("rows", found == expected.num_rows, f"{found} rows, the plan has {expected.num_rows}"),
    ]
    before = 0 if subject.live is None else subject.live.count_rows()
    if expected.added is not None and expected.deleted is not None:
        due = before + expected.added - expected.deleted
        sums = f"{before} rows in live + {expected.added} added - {expected.deleted} deleted = {due}, {found} found"
        results.append(GateResult("rows conserved", due == found, sums))
    if subject.live is not None:
        change, limit = abs(found - before) / max(before, 1), subject.gates.row_change
        detail = f"{before} -> {found} rows is a change of {change:.1%}, allowed are {limit:.1%}"
        advice = "Look at the source: `conjoin plan` counts what is new and deleted"
        results.append(GateResult("row change", change <= limit, detail, advice, change, limit))
    return results


def _id_gates(subject: Subject) -> list[GateResult]:
    """All ids of a small table; of another a sample of those that came, through the id index."""
    import pyarrow.compute as pc

    from conjoin.pipeline import sample

    dataset = subject.dataset
    if dataset.count_rows() <= sample.SAMPLE:
        ids = dataset.to_table(columns=["id"]).column(0)
        asked, found = len(ids), len(ids)
        doubled = found - pc.count_distinct(ids, mode="all").as_py()
    elif sample.can_look_up(dataset):
        ids = _new_ids(subject)
        found = sample.rows_of_ids(dataset, ids, ["id"]).num_rows
        asked, doubled = len(ids), found - len(ids)
    else:
        return []  # check_indexed asks again, when there is an index
    nulls = ids.null_count
    detail = f"{max(doubled, 0)} repeated, {nulls} null and {max(-doubled, 0)} lost ids, of {asked} looked at"
    return [GateResult("ids", doubled == 0 and nulls == 0, detail, "Start over with `conjoin run --full`")]


def _new_ids(subject: Subject) -> pa.ChunkedArray:
    """Ids of up to _LOOKED_UP rows that live does not have, or of the fixed sample."""
    import itertools

    import pyarrow as pa

    from conjoin.pipeline import sample
    from conjoin.pipeline.difference import difference

    if subject.live is None:
        return sample.rows(subject.dataset, ["id"], _LOOKED_UP)["id"]
    batches = difference(subject.live, subject.dataset).added_rows(["id"], _LOOKED_UP)
    rows = list(itertools.islice(batches, 4))
    schema = pa.schema([subject.dataset.schema.field("id")])
    return pa.Table.from_batches(rows, schema)["id"]


def _quarantine_gate(subject: Subject) -> GateResult:
    bad, limit = subject.expected.quarantined, subject.gates.quarantine
    share = bad / max(subject.expected.num_rows, bad, 1)
    detail = (
        f"{bad} of {subject.expected.num_rows} records have a value in quarantine, {share:.2%}, allowed {limit:.2%}"
    )
    advice = "`conjoin repair` shows the reasons"
    return GateResult("quarantine", share <= limit, detail, advice, share, limit)


def _column_gates(subject: Subject) -> list[GateResult]:
    columns, dataset = store.vector_columns(subject.dataset), subject.dataset
    found = {name.removesuffix(store.NEXT) for name in columns}
    wanted = set(subject.expected.columns)
    detail = f"vector columns are {', '.join(sorted(found)) or 'none'}, planned are {', '.join(sorted(wanted))}"
    results = [GateResult("columns", found == wanted, detail)]
    if unknown := [field.name for field in dataset.schema if _is_vector(field.type) and field.name not in columns]:
        detail = f"no encoder's fingerprint is on {', '.join(unknown)}"
        advice = "Somebody else added it: drop the column, or keep it in a table of its own"
        results.append(GateResult("unknown vectors", False, detail, advice))
    replaced = {name.removesuffix(store.NEXT) for name in columns if name.endswith(store.NEXT)}
    for name, column in columns.items():
        size = dataset.schema.field(name).type.list_size
        detail = f"{name}: {size} dimensions, its metadata says {column.dim}"
        results.append(GateResult(f"dimension of {name}", size == column.dim, detail))
        if name in replaced:
            continue  # dropped before anything is published
        same = column.fingerprint == subject.expected.fingerprint
        detail = f"{name}: encoder {column.fingerprint[:12]}, expected {subject.expected.fingerprint[:12]}"
        results.append(GateResult(f"encoder of {name}", same, detail))
    return results


def _is_vector(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type))


def _head_gates(subject: Subject) -> list[GateResult]:
    """What only a head can have: columns that should be gone, and commits of somebody else."""
    left = [name for name in store.vector_columns(subject.dataset) if name.endswith(store.NEXT)]
    detail = f"{', '.join(left)} should have replaced the old column" if left else "every column bears its own name"
    results = [GateResult("names", not left, detail)]
    foreign = _foreign(subject)
    detail = f"{len(foreign)} commits since live are not conjoin's{f': {foreign[0]}' if foreign else ''}"
    advice = "Somebody wrote to the table; run again, which restores live first"
    return [*results, GateResult("commits", not foreign, detail, advice)]


# Operations that change rows. conjoin's own bear a run id; without one it indexes, compacts, adds and drops columns.
_CHANGE_ROWS = {"Append", "Overwrite", "Update", "Delete", "DataReplacement", "DataOverlay", "Clone"}


def _foreign(subject: Subject) -> list[str]:
    """Versions between live and this one that brought rows and name no run."""
    dataset, found = subject.dataset, []
    live = 0 if subject.live is None else int(subject.live.version)
    for version, facts in store.lineage(dataset):
        if version <= live:
            break
        kind = _kind(dataset, version)
        if store.RUN_ID in facts:
            if kind == "Overwrite":
                break  # nothing below it is left
        elif kind in _CHANGE_ROWS:
            found.append(f"version {version}, {kind}")
    return found


def _kind(dataset: lance.LanceDataset, version: int) -> str:
    try:
        transaction = dataset.read_transaction(version)
    except TypeError:  # as in store.lineage
        return "Rewrite"
    return type(transaction.operation).__name__ if transaction is not None else "unknown"


def _index_gates(subject: Subject) -> list[GateResult]:
    """Every row is in every index, and each vector index finds what exact search finds."""
    from conjoin.pipeline.index import incomplete, measured

    dataset = subject.dataset
    names = {index.field_names[0] for index in dataset.describe_indices()}
    missing = {**incomplete(dataset), **({} if "id" in names else {"id": dataset.count_rows()})}
    rows = ", ".join(f"{count} rows are not in {name}" for name, count in missing.items())
    advice = "Run again: the same command extends the indexes"
    results = [GateResult("index complete", not missing, rows or f"{len(names)} indexes hold every row", advice)]
    limit = subject.catalog.table.ann_recall if subject.catalog else 0.0
    for report in measured(dataset):
        recall = report.recall or 0.0
        detail = f"{report.column}: recall@10 is {recall:.4f} against exact search, table.ann_recall is {limit}"
        advice = "Lower table.ann_recall, or drop the index and run again: it is built anew"
        results.append(GateResult(f"recall of {report.column}", recall >= limit, detail, advice, recall, limit))
    return results
