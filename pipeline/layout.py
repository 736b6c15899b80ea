"""The table's columns: what source and encoder give, and how that differs from the table that is there.

Assumes: what was decided when the table was created stays (vector_dtype and thumbnails on `auto`); a change of type is
never made in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conjoin.pipeline.embedding_functions import embedding_functions
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.store import NEXT, Layout, columns_of_schema, table_schema, vector_columns
from conjoin.pipeline.survey import modalities_of

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.columns import SourceSchema
    from conjoin.pipeline.survey import Survey

AUTO_THUMBNAIL_PX = 96
# Above this many bytes of vectors float16 halves the table; recall@10 barely moves (the index re-ranks).
FLOAT16_FROM_BYTES = 8 << 30


@dataclass(frozen=True, slots=True)
class Change:
    """From the table's columns to the plan's. added: columns to add, those of a new encoder under another name first.

    renamed: {name while the night works: final name}; dropped: columns that go when the new ones are filled.
    """

    added: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()

    def working_name(self, name: str) -> str:
        """What a column of the plan is called until the swap."""
        return next((now for now, then in self.renamed if then == name), name)


def lay_out(
    catalog: Catalog, found: Survey, columns: SourceSchema, head: lance.LanceDataset | None
) -> tuple[pa.Schema, int]:
    """The table's schema, and the side of thumbnails in pixels (0: none).

    Its metadata tells LanceDB of the encoders, for interop.py.
    """
    import pyarrow as pa

    modalities = modalities_of(catalog, found.spec)
    uris = tuple(name for name in modalities if columns.contents[name] == "uri")
    wanted = catalog.table.thumbnail_px
    auto = AUTO_THUMBNAIL_PX if "image" not in uris else 0
    if head is not None and wanted == "auto" and "image_vec" in head.schema.names:
        auto = AUTO_THUMBNAIL_PX if "image_thumb" in head.schema.names else 0
    thumbnail_px = (auto if wanted == "auto" else wanted) if "image" in modalities else 0
    layout = Layout(
        id_type=columns.arrow.field(catalog.source.id).type,
        kept=pa.schema([columns.arrow.field(name) for name in dict.fromkeys(catalog.source.keep)]),
        modalities=modalities,
        uris=uris,
        thumbnails=thumbnail_px > 0,
        vector_type=_vector_type(catalog, found, head, len(modalities)),
        fingerprint=found.fingerprint,
        encoder=catalog.encoder,
    )
    schema = table_schema(layout)
    return schema.with_metadata(embedding_functions(schema)), thumbnail_px


def _vector_type(catalog: Catalog, found: Survey, head: lance.LanceDataset | None, columns: int) -> pa.DataType:
    """`auto` is decided when the table is created and stays."""
    import pyarrow as pa

    name: str = catalog.table.vector_dtype
    if name == "auto" and head is not None:
        name = "float16" if head.schema.field(next(iter(vector_columns(head)))).type.value_type == pa.float16() else ""
    elif name == "auto":
        num_bytes = sum(file.num_rows for file in found.files) * columns * found.spec.dim * 4
        name = "float16" if num_bytes >= FLOAT16_FROM_BYTES else ""
    return pa.list_(pa.float16() if name == "float16" else pa.float32(), found.spec.dim)


def row_bytes(schema: pa.Schema, thumbnail_px: int) -> int:
    """About what one row takes in the table; text and kept columns are guessed."""
    vectors = [field.type for field in schema if field.name.endswith("_vec")]
    return 200 + sum(kind.list_size * kind.value_type.bit_width // 8 for kind in vectors) + thumbnail_px**2 // 4


def change_of(dataset: lance.LanceDataset, schema: pa.Schema, *, anew: bool) -> Change:
    """How the table's columns become those of `schema`; anew: every vector is computed again.

    Raises TableError where a column that stays has another type: that takes `--full`.
    """
    before, vectors = dataset.schema, columns_of_schema(schema)
    changed = [
        f"{field.name}: {before.field(field.name).type} there, {field.type} now"
        for field in schema
        if field.name not in vectors and field.name in before.names and before.field(field.name).type != field.type
    ]
    if changed:
        raise TableError(
            f"columns of the source changed their type: {'; '.join(changed)}",
            where=str(dataset.uri),
            next="Give them their old type again, or replace the whole table with `conjoin run --full`",
        )
    replaced = [name for name in vectors if name in before.names] if anew else []
    renamed = tuple((name + NEXT, name) for name in replaced)
    added = [name for name in schema.names if name not in before.names]
    gone = [name for name in before.names if name not in schema.names and not name.endswith(NEXT)]
    return Change((*added, *(now for now, _ in renamed)), renamed, (*replaced, *gone))


def working_schema(schema: pa.Schema, change: Change) -> pa.Schema:
    """The plan's schema with the names that its columns have until the swap."""
    import pyarrow as pa

    return pa.schema([field.with_name(change.working_name(field.name)) for field in schema], schema.metadata)
