"""What a run will do, cut into units and frozen on disk before anything is done.

Assumes: planning reads, decides and writes nothing but the plan; plan.json is written last, so that a plan with it is
whole. A frozen plan never changes: a killed run resumes it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import storage
from conjoin.pipeline.errors import SourceError, TableError
from conjoin.pipeline.layout import Change, working_schema
from conjoin.pipeline.parallel import in_order
from conjoin.pipeline.survey import digest
from conjoin.pipeline.units import Unit

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.source import SourceConfig, SourceFile

# What lies beside plan.json: rows of the units, rows that only the state hears of, rows that leave the table, and
# what stays in quarantine.
ROWS, UNCHANGED, DELETED, QUARANTINED = "rows", "unchanged", "deleted", "quarantined"


@dataclass(frozen=True, slots=True)
class Plan:
    """A frozen plan.

    source: the run file's section that night, as JSON; base_version: the table's head then, 0 without a table;
    base_run: the run whose state it was compared with, empty where the whole table is replaced; change: columns that
    come and go; folder: of the plan's other files, below the run's; files: all of tonight's; stated: numbers of those
    whose state is written anew; counts: rows by what became of them; digest: of all the rest.
    """

    run_id: str
    source: str
    fingerprint: str
    encoder: str
    precision: str
    config: str
    base_version: int
    base_run: str
    thumbnail_px: int
    schema: pa.Schema
    columns: pa.Schema
    change: Change
    folder: str
    files: tuple[SourceFile, ...]
    stated: tuple[int, ...]
    units: tuple[Unit, ...]
    counts: Mapping[str, int]
    digest: str = ""

    @property
    def whole(self) -> bool:
        """Whether the run replaces the whole table."""
        return not self.base_run

    @property
    def rows(self) -> int:
        """Rows of all units."""
        return sum(unit.rows for unit in self.units)

    @property
    def embedded(self) -> int:
        """Rows that some tower looks at."""
        return sum(unit.rows for unit in self.units if unit.embed)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that have vectors."""
        return tuple(name.removesuffix("_vec") for name in self.schema.names if name.endswith("_vec"))

    @property
    def working(self) -> pa.Schema:
        """The schema with the names that columns have until the swap."""
        return working_schema(self.schema, self.change)

    def catalog(self, now: Catalog) -> Catalog:
        """What to read and embed with: as planned, with the workers that the run file gives tonight."""
        source: SourceConfig = type(now.source).model_validate(json.loads(self.source))
        embed = now.embed.model_copy(update={"precision": self.precision})
        return replace(now, source=source, encoder=self.encoder, embed=embed)


def freeze(plan: Plan, run: str) -> Plan:
    """Write plan.json, once: if another process planned this run at the same time, its plan is returned."""
    body = _body(plan)
    text = {**body, "digest": digest(body)}
    storage.create_json(storage.join(run, "plan.json"), text)
    return load_plan(run)


def _body(plan: Plan) -> dict[str, object]:
    fields = asdict(plan)
    for name in ("schema", "columns"):
        fields[name] = text_of_schema(getattr(plan, name))
    return {name: value for name, value in fields.items() if name != "digest"}


def load_plan(run: str) -> Plan:
    """The frozen plan of a run directory. Raises StorageError if there is none, TableError if it was tampered with."""
    from conjoin.pipeline.state import source_file

    raw = storage.read_json(storage.join(run, "plan.json"))
    kept = str(raw.pop("digest"))
    body = {name: value for name, value in raw.items() if name != "format"}
    if digest(body) != kept:
        raise TableError("plan.json does not match its digest", where=run, next="Remove this run's directory")
    files = cast("list[dict[str, object]]", body.pop("files"))
    units = cast("list[dict[str, object]]", body.pop("units"))
    change = cast("dict[str, object]", body.pop("change"))
    schemas = {name: schema_of_text(str(body.pop(name))) for name in ("schema", "columns")}
    stated = tuple(cast("list[int]", body.pop("stated")))
    return Plan(
        **body,  # type: ignore[arg-type]  # our own JSON, its digest checked
        schema=schemas["schema"],
        columns=schemas["columns"],
        stated=stated,
        change=Change(
            added=tuple(cast("list[str]", change["added"])),
            renamed=tuple((now, then) for now, then in cast("list[list[str]]", change["renamed"])),
            dropped=tuple(cast("list[str]", change["dropped"])),
        ),
        files=tuple(source_file(file) for file in files),
        units=tuple(Unit.from_json(unit) for unit in units),
        digest=kept,
    )


def text_of_schema(schema: pa.Schema) -> str:
    """An Arrow schema for JSON."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def schema_of_text(text: str) -> pa.Schema:
    import pyarrow as pa

    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def changed_since(plan: Plan, listed: Mapping[str, SourceFile]) -> dict[str, str]:
    """Files of the plan that are not what they were, with what became of them; listed: tonight's, by path."""
    found = in_order(plan.files, lambda file: (file.path, _difference(file, listed)))
    return {path: what for path, what in found if what}


def _difference(file: SourceFile, listed: Mapping[str, SourceFile]) -> str:
    """What became of a planned file, empty if nothing; tonight's listing may be of another day's directory."""
    if file.path in listed:
        return "" if listed[file.path] == file else "changed"
    now = storage.list_stats(file.path)
    if not now:
        return "is gone"
    return "" if (now[0].size_bytes, now[0].etag) == (file.size_bytes, file.etag) else "changed"


def file_of_plan(run: str, plan: Plan, what: str) -> str:
    """Where the rows, deletions, ... of a plan lie."""
    return storage.join(run, plan.folder, f"{what}.parquet")


class PlanRows:
    """The rows of a plan's units, row group u for unit u; the file stays open for further units."""

    def __init__(self, run: str, plan: Plan) -> None:
        self._run, self._where = run, file_of_plan(run, plan, ROWS)
        self._file: pq.ParquetFile | None = None

    def read(self, unit: int) -> pa.Table:
        """Raises StorageError where the file cannot be read, SourceError where it is gone."""
        return storage.retry(lambda: self._read(unit), verb="read", where=self._where)

    def _read(self, unit: int) -> pa.Table:
        import pyarrow.parquet as pq

        fs, path = storage.filesystem(self._where)
        try:
            self._file = self._file or pq.ParquetFile(path, filesystem=fs)
            return self._file.read_row_group(unit)
        except FileNotFoundError as error:
            what = "the rows of the plan are gone"
            raise SourceError(what, where=self._run, next="Remove this run's directory") from error
        except OSError:
            self._file = None  # opened anew at the next try
            raise
