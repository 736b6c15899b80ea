"""`from conjoin import interop`: plain LanceDB searches our tables by words and pictures, with the columns' encoders.

    from conjoin import interop
    table = lancedb.connect("vectors").open_table("things")
    table.search("red apple", vector_column_name="image_vec").limit(5).to_pandas()

Assumes: importing this module registers the embedding function `conjoin` with lancedb; the table's schema metadata
names it (embedding_functions.py). Rows come into a table by the night alone: `add` of rows without vectors is refused,
since their ids would be in no state; vectors that somebody adds are not live, and the next night drops them.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING

from lancedb.embeddings import EmbeddingFunction, get_registry

from conjoin.pipeline.embedding_functions import NAME
from conjoin.pipeline.errors import QueryError, TableError
from conjoin.pipeline.query.vectors import matching_encoder
from conjoin.pipeline.store import VectorColumn

if TYPE_CHECKING:
    import numpy as np

    from conjoin.pipeline.embedder import Embedder


@get_registry().register(NAME)
class ConjoinFunction(EmbeddingFunction):
    """One vector column's encoder, as the schema metadata describes it; loaded on the first search."""

    encoder: str
    fingerprint: str
    modality: str
    dim: int

    def ndims(self) -> int:
        return self.dim

    def compute_query_embeddings(self, query: object, *_: object, **__: object) -> list[np.ndarray]:
        """(1, D): words, or a picture as PIL image or bytes. Raises QueryError or EncoderError."""
        modality, value = _value(query)
        encoder = _encoder(self.encoder, self.fingerprint)
        if modality not in encoder.spec.towers:
            raise QueryError(f"the encoder has no {modality} tower", where=self.encoder)
        found = encoder.embed(modality, [value])
        if found.bad or not found.present[0]:
            reason = found.bad[0].reason if found.bad else "nothing to embed"
            raise QueryError(f"the query cannot be embedded as {modality}: {reason}")
        return [found.vectors[0]]

    def compute_query_embeddings_with_retry(self, *args: object, **kwargs: object) -> list[np.ndarray]:
        """Once: what goes wrong here does not pass by waiting, and lancedb would hide it in an exception of its own."""
        return self.compute_query_embeddings(*args, **kwargs)

    def compute_source_embeddings_with_retry(self, *args: object, **kwargs: object) -> list[np.ndarray]:
        return self.compute_source_embeddings(*args, **kwargs)

    def compute_source_embeddings(self, *_: object, **__: object) -> list[np.ndarray]:
        raise TableError(
            f"rows are not added to a conjoin table by hand: the {self.modality} would be embedded here, and the row's "
            "id would be in no state",
            next="Add them to the source and run `conjoin run`",
        )


def _value(query: object) -> tuple[str, str | bytes]:
    if isinstance(query, str):
        return "text", query
    if isinstance(query, bytes):
        return "image", query
    if hasattr(query, "save"):
        data = io.BytesIO()
        query.save(data, format="PNG")
        return "image", data.getvalue()
    raise QueryError(f"cannot search for a {type(query).__name__}", next="Search for words, a picture or a vector")


@lru_cache(maxsize=4)
def _encoder(folder: str, fingerprint: str) -> Embedder:
    return matching_encoder(VectorColumn("the column", "", fingerprint, 0, "cosine", folder))
