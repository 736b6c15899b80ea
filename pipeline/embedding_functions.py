"""What plain LanceDB needs to know to search a table by words: its `embedding_functions` schema metadata.

Assumes: the metadata names encoders by folder and fingerprint, so whoever changes a vector column's encoder writes it
anew in the same commit. Vector search never looks at it; a text search or `add` without `from conjoin import interop`
stops at it (a KeyError of lancedb's registry).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from conjoin.pipeline import store

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "conjoin"
KEY = b"embedding_functions"


def embedding_functions(schema: pa.Schema) -> dict[bytes, bytes]:
    """Schema metadata for the vector columns of `schema` that say where their encoder is; empty without any."""
    columns = [column for column in store.columns_of_schema(schema).values() if column.encoder]
    found = [
        {
            "name": NAME,
            "model": {"encoder": c.encoder, "fingerprint": c.fingerprint, "modality": c.modality, "dim": c.dim},
            "source_column": "id",  # LanceDB wants one that every row has; nothing is ever embedded from it
            "vector_column": c.name,
        }
        for c in columns
    ]
    return {KEY: json.dumps(found).encode()} if found else {}
