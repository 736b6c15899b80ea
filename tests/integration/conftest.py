"""Lance tables made by hand, as a night would write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

FINGERPRINT = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True, slots=True)
class Made:
    """A table and what is in it. vectors: (N, D) float32, NaN rows where null."""

    uri: str
    rows: pa.Table
    vectors: dict[str, np.ndarray]


def clustered(num_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """(N, D) float32 unit vectors with neighbourhoods, like embeddings and unlike noise."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(max(num_rows // 50, 4), 24))
    points = latent[rng.integers(len(latent), size=num_rows)] + 0.6 * rng.normal(size=(num_rows, 24))
    mixed = np.tanh(points @ rng.normal(size=(24, dim)) / 5) + 0.05 * rng.normal(size=(num_rows, dim))
    return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)


def vector_array(vectors: np.ndarray, dtype: pa.DataType) -> pa.Array:
    missing = np.isnan(vectors).any(axis=1)
    values = pa.array(np.nan_to_num(vectors).ravel().astype(dtype.to_pandas_dtype()), dtype)
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1], mask=pa.array(missing))


def vector_field(name: str, dim: int, dtype: pa.DataType, fingerprint: str, encoder: str) -> pa.Field:
    modality = name.removesuffix("_vec")
    facts = {"fingerprint": fingerprint, "modality": modality, "metric": "cosine", "dim": str(dim), "encoder": encoder}
    metadata = {f"conjoin:{key}": value for key, value in facts.items()}
    return pa.field(name, pa.list_(dtype, dim), metadata=metadata)


@pytest.fixture
def make_table(tmp_path) -> Callable[..., Made]:
    """make(num_rows, dim=16, dtype="float32", nulls=0, columns=(...), live=True, uri=...) -> Made."""
    import lance

    from conjoin.pipeline import storage

    def make(
        num_rows: int,
        dim: int = 16,
        dtype: str = "float32",
        nulls: int = 0,
        columns: tuple[str, ...] = ("image_vec", "text_vec"),
        live: bool = True,
        uri: str = "",
        fingerprint: str = FINGERPRINT,
        encoder: str = "",
        seed: int = 0,
        mode: str = "create",
    ) -> Made:
        uri = uri or f"{tmp_path}/things.lance"
        kind = pa.type_for_alias(dtype)
        rng = np.random.default_rng(seed)
        rows = {
            "id": pa.array([f"row-{seed}-{i:06d}" for i in range(num_rows)]),
            "caption": pa.array([f'thing number {i % 97}; it\'s "quoted"' for i in range(num_rows)]),
            "price": pa.array(np.round(rng.random(num_rows) * 100, 2)),
            "stock": pa.array(rng.permutation(num_rows).astype(np.int64)),
            "Odd Name": pa.array([None if i % 5 == 0 else i % 7 for i in range(num_rows)], pa.int32()),
            "day": pa.array(np.datetime64("2024-01-01") + rng.integers(0, 400, num_rows)),
        }
        fields = [pa.field(name, array.type) for name, array in rows.items()]
        vectors = {}
        for position, name in enumerate(columns):
            values = clustered(num_rows, dim, seed + position)
            if nulls:
                values[rng.choice(num_rows, nulls, replace=False)] = np.nan
            vectors[name] = values.astype(kind.to_pandas_dtype()).astype(np.float32)
            hashes = [i.to_bytes(16, "big") for i in range(num_rows)]
            rows[f"{name.removesuffix('_vec')}_hash"] = pa.array(hashes, pa.binary(16))
            fields.append(pa.field(f"{name.removesuffix('_vec')}_hash", pa.binary(16)))
            rows[name] = vector_array(values, kind)
            fields.append(vector_field(name, dim, kind, fingerprint, encoder))
        table = pa.table(rows, schema=pa.schema(fields))
        dataset = lance.write_dataset(
            table,
            uri,
            mode=mode,
            max_rows_per_file=max(num_rows // 3, 1),
            data_storage_version="2.2",
            storage_options=storage.lance_options(uri),
        )
        if live:
            tags = dataset.tags
            (tags.update if "live" in tags.list() else tags.create)("live", dataset.version)
        return Made(uri, table, vectors)

    return make
