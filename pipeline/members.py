"""Samples of a WebDataset tar as columns: what each member's extension and each field of its JSON becomes.

Assumes: frames are what Ray's reader gives without a decoder: `__key__`, and bytes per extension. All frames of a file
are added before the first one becomes a table, because a late sample may bring an extension of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from conjoin.pipeline.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

KEY = "__key__"
_JSON = "json"
_TEXTS = {"txt", "text", "caption", "transcript", "cls", "cls2", "json", "jsonl", "xml", "html", "md", "srt", "vtt"}
_INT64 = 1 << 63

Frame = Mapping[str, Sequence[object]]


class Members:
    """The columns of one tar; file: for errors; name: of the tar, which keeps its keys apart from those of others."""

    def __init__(self, file: str, name: str) -> None:
        self._file, self._name = file, name
        self._extensions: dict[str, None] = {}
        self._fields: dict[str, set[str]] = {}

    def add(self, frame: Frame) -> None:
        """Learn of a frame's columns. Raises SourceError for a key that leaves the tar."""
        for key in frame[KEY]:
            if str(key).startswith("/") or ".." in str(key).split("/"):
                advice = "Write it again with names inside its own folder"
                raise SourceError(f"the tar holds {str(key)!r}, a path out of it", where=self._file, next=advice)
        self._extensions |= {name: None for name in frame if not name.startswith("__")}
        for fields in _objects(frame):
            for name, value in fields.items():
                self._fields.setdefault(name, set()).update(_kinds(value))

    def schema(self) -> pa.Schema:
        """The key, extensions, fields. Raises SourceError if the tar holds no sample."""
        import pyarrow as pa

        if not self._extensions:
            raise SourceError("the tar holds no sample", where=self._file, next="Members are named <key>.<extension>")
        found = {KEY: pa.string()}
        found |= {name: pa.string() if _is_text(name) else pa.binary() for name in self._extensions}
        return pa.schema(found | {self._column(name): _type(kinds) for name, kinds in self._fields.items()})

    def table(self, frame: Frame) -> pa.Table:
        """A frame in the schema. Text that is not UTF-8 stays as it is: decoding names such rows."""
        import pyarrow as pa

        schema = self.schema()
        keys = [f"{self._name}/{str(key).removeprefix('./')}" for key in frame[KEY]]
        columns = {KEY: pa.array(keys, pa.string())}
        for name in self._extensions:
            given = frame.get(name, [None] * len(keys))
            values = pa.array([value if isinstance(value, bytes) else None for value in given], pa.binary())
            columns[name] = values.view(pa.string()) if _is_text(name) else values
        rows = _objects(frame)
        for name in self._fields:
            kind = schema.field(self._column(name)).type
            columns[self._column(name)] = pa.array([_cast(row.get(name), kind) for row in rows], kind)
        return pa.table(columns, schema=schema)

    def _column(self, field: str) -> str:
        return f"{_JSON}.{field}" if field in self._extensions or field.startswith("__") else field


def _is_text(extension: str) -> bool:
    return extension.rpartition(".")[2].lower() in _TEXTS


def _objects(frame: Frame) -> list[Mapping[str, object]]:
    """The JSON object of each sample, without fields where it has none or a torn one."""
    return [_object(value) for value in frame.get(_JSON, [None] * len(frame[KEY]))]


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, bytes):
        return {}
    try:
        found = json.loads(value)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _kinds(value: object) -> set[str]:
    """What a field's value asks of its column; nothing for null, objects and mixed lists, which are left out."""
    if isinstance(value, bool):
        return {"bool"}
    if isinstance(value, int):
        return {"int" if -_INT64 <= value < _INT64 else "text"}
    if isinstance(value, float):
        return {"float"}
    if isinstance(value, str):
        return {"text"}
    is_texts = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    return {"texts"} if is_texts else set()


def _type(kinds: set[str]) -> pa.DataType:
    import pyarrow as pa

    if "texts" in kinds:
        return pa.list_(pa.string())
    if kinds == {"int", "float"}:
        return pa.float64()
    plain = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
    return plain.get(next(iter(kinds)), pa.string()) if len(kinds) == 1 else pa.string() if kinds else pa.null()


def _cast(value: object, kind: pa.DataType) -> object:
    import pyarrow as pa

    if not _kinds(value) or pa.types.is_null(kind):
        return None
    if pa.types.is_list(kind):
        return value if isinstance(value, list) else [_as_text(value)]
    if pa.types.is_string(kind):
        return _as_text(value)
    return float(str(value)) if pa.types.is_float64(kind) else value


def _as_text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()
