"""Columns of the source: plain types every engine can filter on, one type for all files, and what fits which role.

Assumes: types come from Parquet footers alone; no row is read to find them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from conjoin.pipeline import records
from conjoin.pipeline.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.pipeline.source import SourceConfig

Content = Literal["text", "bytes", "uri"]
_SHOWN_COLUMNS = 12
LIVE_VERSION = "the live version"  # stands for a file where the columns of an earlier night are compared


@dataclass(frozen=True, slots=True)
class SourceSchema:
    """arrow: every column the run file names, in plain types; contents: what each modality's values are.

    `id` is string or int64; dictionaries, large and view types never occur.
    """

    arrow: pa.Schema
    contents: dict[str, Content]


def plain(kind: pa.DataType) -> pa.DataType:
    """The same values in a type every engine can filter on: no dictionaries, no large, view or fixed-size types."""
    import pyarrow as pa

    is_a = pa.types
    if is_a.is_dictionary(kind):
        return plain(kind.value_type)
    if is_a.is_large_string(kind) or is_a.is_string_view(kind):
        return pa.string()
    if is_a.is_large_binary(kind) or is_a.is_binary_view(kind) or is_a.is_fixed_size_binary(kind):
        return pa.binary()
    if is_a.is_large_list(kind) or is_a.is_list(kind) or is_a.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type))
    if is_a.is_struct(kind):
        return pa.struct([(kind.field(i).name, plain(kind.field(i).type)) for i in range(kind.num_fields)])
    return kind


def plain_id(kind: pa.DataType) -> pa.DataType:
    """int64 for integers, string for strings; any other type as it is."""
    import pyarrow as pa

    return pa.int64() if pa.types.is_integer(kind) else plain(kind)


def unify(config: SourceConfig, schemas: Sequence[tuple[str, pa.Schema]]) -> SourceSchema:
    """The columns the run file names over all files; schemas: (file, its schema).

    Raises SourceError naming file and column: missing, of different types in two files, or unfit for its role.
    """
    import pyarrow as pa

    _check_present(config, schemas)
    distinct: dict[pa.Schema, str] = {}
    for file, schema in schemas:
        distinct.setdefault(schema, file)
    fields = [(name, _merged(config, name, distinct)) for name in records.all_columns(config)]
    arrow = pa.schema(fields)
    file = schemas[0][0]
    _check_id(config, arrow.field(config.id).type, file)
    contents = {m: _content(config, m, arrow, file) for m in config.modalities}
    return SourceSchema(arrow, contents)


def _check_present(config: SourceConfig, schemas: Sequence[tuple[str, pa.Schema]]) -> None:
    """Every named column is in every file, once; other columns are nobody's business."""
    for name in records.all_columns(config):
        role = _role(config, name)
        for file, schema in schemas:
            if (count := schema.names.count(name)) > 1:
                what = f"{role}: {count} columns are named {name!r}"
                raise SourceError(what, where=file, next="Rename all but one")
        lacking = [(file, schema) for file, schema in schemas if name not in schema.names]
        if lacking:
            some = f" in {len(lacking)} of {len(schemas)} files" if len(lacking) < len(schemas) else ""
            advice = _nearest(name, lacking[0][1].names)
            if some and not advice:
                advice = f"Write it there too, null where it has no value, or take it out of {role}"
            advice = advice or f"Its columns are: {_shown(lacking[0][1].names)}"
            raise SourceError(f"{role}: no column {name!r}{some}", where=lacking[0][0], next=advice)


def _nearest(name: str, names: Sequence[str]) -> str:
    """A question about the nearest name, capitals aside; empty if none is near."""
    by_small = {other.lower(): other for other in reversed(names)}
    near = difflib.get_close_matches(name.lower(), list(by_small), 1, 0.6)
    return f"Did you mean {by_small[near[0]]!r}?" if near else ""


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN_COLUMNS]) + (", ..." if len(names) > _SHOWN_COLUMNS else "")


def _merged(config: SourceConfig, name: str, schemas: dict[pa.Schema, str]) -> pa.DataType:
    """One type for all files: null gives way, integers and floats widen; anything else is an error.

    Arrow would also merge texts with bytes: addresses would be taken for pictures. Only texts may come as bytes.
    """
    import pyarrow as pa

    simplify = plain_id if name == config.id else plain
    first, *others = schemas
    merged = pa.schema([(name, simplify(first.field(name).type))])
    for schema in others:
        field = pa.schema([(name, simplify(schema.field(name).type))])
        try:
            if (
                _is_text(merged) != _is_text(field)
                and _role(config, name) != "source.text"
                and _is_bytes(merged, field)
            ):
                raise pa.ArrowTypeError("texts and bytes")
            merged = pa.unify_schemas([merged, field], promote_options="permissive")
        except pa.ArrowTypeError as error:
            here, there = field.field(0).type, merged.field(0).type
            what = f"{_role(config, name)}: column {name!r} is {here} here, but {there} in {schemas[first]}"
            advice = "Give the column one type in all files"
            if schemas[first] == LIVE_VERSION:
                advice = "Give it its old type again, or make the whole table anew with `conjoin run --full`"
            raise SourceError(what, where=schemas[schema], next=advice) from error
    return merged.field(0).type


def _is_text(one: pa.Schema) -> bool:
    import pyarrow as pa

    return pa.types.is_string(_item(one.field(0).type))


def _is_bytes(*several: pa.Schema) -> bool:
    import pyarrow as pa

    return any(pa.types.is_binary(_item(one.field(0).type)) for one in several)


def _check_id(config: SourceConfig, kind: pa.DataType, file: str) -> None:
    import pyarrow as pa

    if not (pa.types.is_string(kind) or pa.types.is_int64(kind)):
        advice = "Choose a string or integer column that is unique"
        raise SourceError(f"source.id: column {config.id!r} is {kind}", where=file, next=advice)


def _content(config: SourceConfig, modality: str, arrow: pa.Schema, file: str) -> Content:
    """What a modality's values are; a template's columns only need to be writable as text."""
    import pyarrow as pa

    names = records.columns_of(config, modality)
    if modality == "text" and "{" in str(config.text):
        return "text"
    kind = arrow.field(names[0]).type
    item = _item(kind)
    if pa.types.is_null(item):
        return "text" if modality == "text" else "bytes"
    if pa.types.is_string(item):
        return "text" if modality == "text" else "uri"
    if pa.types.is_binary(item):
        return "text" if modality == "text" else "bytes"
    wanted = "text (or a template over columns)" if modality == "text" else "bytes, URIs, or a list of these"
    what = f"source.{modality}: column {names[0]!r} is {kind}"
    raise SourceError(what, where=file, next=f"{modality} needs {wanted}")


def _item(kind: pa.DataType) -> pa.DataType:
    """The type of single values: of lists their items, of a {bytes, path} struct its bytes."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        for name in ("bytes", "path"):
            position = kind.get_field_index(name)
            if position >= 0:
                return kind.field(position).type
    return kind


def _role(config: SourceConfig, column: str) -> str:
    """The run file's field that names a column."""
    for field in ("id", "group", "changed_by", "image", "text", "audio"):
        named = getattr(config, field)
        if named == column or (field == "text" and column in records.columns_of(config, "text")):
            return f"source.{field}"
    return "source.keep"
