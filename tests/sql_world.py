"""A table with everything that SQL meets in one: nulls, ties, odd names, an index, later rows and deleted ones.

Assumes: `previous` is the version that was indexed, `live` the head, to which rows were added and from which some
were deleted since. What the reference sees is read back whole from the plain table, without any search.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from conjoin.pipeline import index, store

ROWS = 12_000
ADDED = 600
DIM = 64
VECTORS = {"image_vec": pa.float32(), "text_vec": pa.float16()}
BRANDS = ("acme", "Acme", "bolt", "O'Neil; co", "Gr\u00f6\u00dfe", "", "x%y", "tiny", None)
_SHARES = (0.3, 0.05, 0.2, 0.1, 0.1, 0.05, 0.1, 0.005, 0.095)
_WORDS = ("red", "blue", "shoe", "it's", 'a "quoted" hat', "Caf\u00e9", "100%", "under_score", "")


@dataclass(frozen=True, slots=True)
class World:
    """uri: of the table with an index; plain: of the same rows without one; live, previous: all rows, as Arrow.

    vectors: (N, D) float64 of unit length in the order of `live`, NaN where null; previous_number: of each table.
    """

    uri: str
    plain: str
    live: pa.Table
    previous: pa.Table
    vectors: dict[str, np.ndarray]
    frames: dict[str, pa.Table]
    previous_number: dict[str, int]


def build(folder: Path) -> World:
    """Write both tables below a folder."""
    rows = _rows(0, ROWS, seed=1)
    added = _rows(ROWS, ADDED, seed=2)
    numbers = {}
    uris = [f"{folder}/{kind}/things.lance" for kind in ("indexed", "plain")]
    for uri in uris:
        lance.write_dataset(rows, uri, max_rows_per_file=ROWS // 3, data_storage_version="2.2")
        if uri == uris[0]:
            reports = index.build(uri, store.TableConfig(path=uri), exact_floats=100_000)
            assert [report.kind for report in reports] == ["BTREE", index.KIND, index.KIND]
        dataset = lance.dataset(uri)
        dataset.tags.create("previous", dataset.version)
        numbers[uri] = dataset.version
        dataset.delete("stock % 40 = 7")
        dataset = lance.write_dataset(added, uri, mode="append")
        dataset.tags.create("live", dataset.version)
    live = _readable(lance.dataset(uris[1]).to_table())
    vectors = {name: _units(live.column(name)) for name in VECTORS}
    previous = _readable(lance.dataset(uris[1], version=numbers[uris[1]]).to_table())
    return World(*uris, live, previous, vectors, _frames(live), numbers)


def _rows(first: int, num_rows: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    numbers = np.arange(first, first + num_rows)

    def some(values: object, kind: pa.DataType, nulls: float) -> pa.Array:
        return pa.array(values, kind, mask=rng.random(num_rows) < nulls)

    price = np.round(rng.gamma(2.0, 20.0, num_rows), 2)
    price[rng.random(num_rows) < 0.004] = np.nan
    price[rng.random(num_rows) < 0.004] = -0.0
    words = rng.choice(_WORDS, (num_rows, 2))
    micros = np.datetime64("2024-01-01T00:00:00", "us") + rng.integers(0, 3 * 10**13, num_rows)
    columns = {
        "id": pa.array([f"r{n:05d}" for n in numbers]),
        "title": some([f"{a} {b} {n % 50}" for (a, b), n in zip(words, numbers, strict=True)], pa.string(), 0.03),
        "brand": pa.array(rng.choice(np.array(BRANDS, dtype=object), num_rows, p=_SHARES), pa.string()),
        "price": some(price, pa.float64(), 0.05),
        "rating": some(np.round(rng.random(num_rows) * 10) / 2, pa.float32(), 0.2),
        "stock": pa.array(rng.permutation(num_rows) + first, pa.int64()),
        "small": some(rng.integers(0, 200, num_rows), pa.uint16(), 0.01),
        "Odd Name": some(rng.integers(-3, 4, num_rows), pa.int32(), 0.2),
        "select": some(rng.integers(0, 5, num_rows), pa.int8(), 0.0),
        "\u00e9tat": some(rng.choice(["neuf", "us\u00e9"], num_rows), pa.string(), 0.1),
        "available": some(rng.random(num_rows) < 0.7, pa.bool_(), 0.1),
        "day": some(micros.astype("datetime64[D]"), pa.date32(), 0.02),
        "seen_at": some(micros, pa.timestamp("us"), 0.02),
    }
    fields = [pa.field(name, values.type) for name, values in columns.items()]
    for (name, kind), values in zip(VECTORS.items(), _embedded(num_rows, rng), strict=True):
        columns[name] = _column(values, kind, rng.random(num_rows) < 0.05)
        fields.append(_field(name, kind))
    return pa.table(columns, schema=pa.schema(fields))


def _embedded(num_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pictures in clusters and texts near them; every tenth row repeats the vectors of another one."""
    shared = np.random.default_rng(0)  # later rows lie among the earlier ones
    centres, mixing = shared.normal(size=(200, 24)), shared.normal(size=(24, DIM))
    points = centres[rng.integers(len(centres), size=num_rows)] + 0.6 * rng.normal(size=(num_rows, 24))
    images = np.tanh(points @ mixing / 5) + 0.05 * rng.normal(size=(num_rows, DIM))
    texts = np.tanh(points @ mixing / 5 + 0.3) + 0.3 * rng.normal(size=(num_rows, DIM))
    copies = rng.choice(num_rows, num_rows // 10, replace=False)
    originals = rng.choice(num_rows // 20, len(copies))
    for values in (images, texts):
        values[copies] = values[originals]
        values /= np.linalg.norm(values, axis=1, keepdims=True)
    return images, texts


def _column(values: np.ndarray, kind: pa.DataType, missing: np.ndarray) -> pa.Array:
    flat = pa.array(values.ravel().astype(kind.to_pandas_dtype()), kind)
    return pa.FixedSizeListArray.from_arrays(flat, DIM, mask=pa.array(missing))


def _field(name: str, kind: pa.DataType) -> pa.Field:
    modality = name.removesuffix("_vec")
    facts = {"fingerprint": "ab" * 16, "modality": modality, "metric": "cosine", "dim": str(DIM), "encoder": ""}
    return pa.field(name, pa.list_(kind, DIM), metadata={f"conjoin:{key}": value for key, value in facts.items()})


def _readable(table: pa.Table) -> pa.Table:
    """Half floats as floats: DuckDB has none."""
    fields = [f.with_type(pa.list_(pa.float32(), DIM)) if f.name in VECTORS else f for f in table.schema]
    return table.cast(pa.schema(fields))


def _units(column: pa.ChunkedArray) -> np.ndarray:
    present = column.is_valid().to_numpy()
    values = np.full((len(column), DIM), np.nan)
    values[present] = column.drop_null().combine_chunks().flatten().to_numpy().reshape(-1, DIM)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def _frames(live: pa.Table) -> dict[str, pa.Table]:
    """picks: some ids, repeated, unknown and null ones among them; brands: facts about most brands; asked: vectors."""
    rng = np.random.default_rng(3)
    ids = live.column("id").to_pylist()
    picked = [ids[i] for i in rng.integers(len(ids), size=380)]
    picked += picked[:10] + ["unknown", None] + [f"r{n}" for n in range(8)]
    vectors = _column(rng.permutation(_embedded(40, rng)[1]), pa.float32(), np.arange(40) % 13 == 12)
    known = [brand for brand in BRANDS if brand and brand != "bolt"]
    return {
        "picks": pa.table({"id": picked, "pick": range(len(picked)), "weight": rng.random(len(picked)).round(3)}),
        "brands": pa.table(
            {"brand": [*known, "nobody"], "country": ["de", "fr", "de", "us", "fr", "it", "us"][: len(known) + 1]}
        ),
        "asked": pa.table(
            {"q": pa.array(range(40), pa.int32()), "topic": [f"t{i % 7}" for i in range(40)], "v": vectors}
        ),
    }
