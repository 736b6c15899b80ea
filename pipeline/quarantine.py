"""The table `<name>__quarantine`: values that could not be used, each with its reason, keyed by (id, modality, run).

Assumes: a run replaces its own rows and no others; which runs' rows still hold is in the live manifest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from conjoin.pipeline import storage
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.state import read_manifest
from conjoin.pipeline.store import LIVE, STORAGE_VERSION, head, open_version, quarantine_uri

if TYPE_CHECKING:
    import lance
    import pyarrow as pa


def quarantine_schema(id_type: pa.DataType) -> pa.Schema:
    """modality is empty for a record that has no value in any; stage: read, fetch, decode or embed."""
    import pyarrow as pa

    text = ["modality", "run_id", "stage", "reason", "file"]
    position = [pa.field("row_group", pa.int32()), pa.field("row", pa.int64())]
    return pa.schema(
        [pa.field("id", id_type, nullable=False), *(pa.field(name, pa.string()) for name in text), *position]
    )


def replace_rows(uri: str, run_id: str, rows: pa.Table) -> None:
    """Make `rows` (of quarantine_schema) what run `run_id` has in quarantine; repeating it changes nothing.

    Two commits, delete and append: readers filter by the live manifest, which does not name this run yet. Where the
    ids' type changed (a `--full` run over another source) all of them become strings. Raises StorageError, and
    TableError if the table there is somebody else's.
    """
    target = quarantine_uri(uri)
    with storage.explaining("write the quarantine", target):
        _replace(target, run_id, rows)


def check_quarantine(uri: str) -> None:
    """Raises TableError if a table of somebody else lies where the quarantine of the table at `uri` goes."""
    _ours(quarantine_uri(uri))


def _ours(target: str) -> lance.LanceDataset | None:
    import pyarrow as pa

    dataset = head(target)
    if dataset is not None and dataset.schema.names != quarantine_schema(pa.string()).names:
        what = "there is a table in the place of the quarantine, and conjoin did not make it"
        raise TableError(what, where=target, next="Move it away, or give table.path another name")
    return dataset


def _replace(target: str, run_id: str, rows: pa.Table) -> None:
    import lance
    import pyarrow as pa

    dataset = _ours(target)
    mode = "create" if dataset is None else "append"
    if dataset is not None:
        dataset.delete(f"run_id = '{run_id}'")
        if dataset.schema.field("id").type != rows.schema.field("id").type:
            text = quarantine_schema(pa.string())
            rows = rows.cast(text)
            if not pa.types.is_string(dataset.schema.field("id").type):
                rows, mode = pa.concat_tables([dataset.to_table().cast(text), rows]), "overwrite"
    if rows.num_rows:
        lance.write_dataset(
            rows, target, mode=mode, data_storage_version=STORAGE_VERSION, storage_options=storage.lance_options(target)
        )


def read_quarantine(uri: str, version: str | int | None = LIVE) -> pa.Table | None:
    """The rows in quarantine that belong to a version of the table at `uri`; None if nothing ever was."""
    manifest = read_manifest(open_version(uri, version))
    dataset = head(quarantine_uri(uri))
    if manifest is None or dataset is None:
        return None
    runs = ", ".join(f"'{run}'" for run in manifest.quarantine)
    return dataset.to_table(filter=f"run_id IN ({runs})")
