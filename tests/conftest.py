"""Shared things: Ray, an S3 server, a tiny encoder, each once a session; Lance tables as a night would write them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

DATA = Path(__file__).parent / "data"
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


def _make(
    uri: str,
    num_rows: int,
    dim: int = 16,
    dtype: str = "float32",
    nulls: int = 0,
    columns: tuple[str, ...] = ("image_vec", "text_vec"),
    live: bool = True,
    fingerprint: str = FINGERPRINT,
    encoder: str = "",
    seed: int = 0,
    mode: str = "create",
) -> Made:
    import lance

    from conjoin.pipeline import storage

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


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder with random weights: text, pictures at 16 px, sounds of half a second, into 8 dimensions."""
    from conjoin.encoders.checkpoint import save
    from conjoin.encoders.joint import build
    from conjoin.encoders.options import TowerOptions

    towers = {
        "text": TowerOptions(max_tokens=16, width=16),
        "image": TowerOptions(size_px=16, width=16),
        "audio": TowerOptions(max_s=0.5, width=16),
    }
    folder = tmp_path_factory.mktemp("small") / "encoder"
    save(build(towers, 8, ["red apple", "green apple", "a cat on a mat", "blue car"]), folder, {})
    return folder


@pytest.fixture(scope="session")
def emoji() -> Path:
    """6,639 pictures with captions, five vendors."""
    return DATA / "emoji.parquet"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Real Ray on this machine, once for all tests that need it."""
    import ray

    from conjoin.pipeline import workers

    workers.start()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def _moto() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(endpoint, timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield endpoint
    finally:
        server.terminate()
        server.wait(10)
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})


@pytest.fixture
def s3(_moto: str, request: pytest.FixtureRequest) -> str:
    """A fresh bucket on a real S3 endpoint (moto), as a URI without a trailing slash."""
    import s3fs

    bucket = f"test-{abs(hash(request.node.nodeid)) % 10**10}-{time.monotonic_ns() % 10**6}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder with random weights: pictures at 16 px and text into 8 dimensions."""
    import torch

    from conjoin.encoders.checkpoint import save
    from conjoin.encoders.joint import build
    from conjoin.encoders.towers import TowerOptions

    torch.manual_seed(0)
    captions = ["red apple", "green apple", "a cat on a mat", "dog", "blue car", "tree and flower"]
    towers = {"image": TowerOptions(model="builtin", size_px=16), "text": TowerOptions(model="builtin", max_tokens=16)}
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    save(build(towers, 8, captions), folder, {})
    return folder


@pytest.fixture(scope="session")
def make_table_at() -> Callable[..., Made]:
    """make(uri, num_rows, dim=16, dtype="float32", nulls=0, columns=(...), live=True, ...) -> Made."""
    return _make


@pytest.fixture
def make_table(tmp_path: Path) -> Callable[..., Made]:
    """The same at `<tmp_path>/things.lance`, unless told otherwise."""

    def make(num_rows: int, dim: int = 16, *, uri: str = "", **options: object) -> Made:
        return _make(uri or f"{tmp_path}/things.lance", num_rows, dim, **options)

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip with the reason where there is none."""
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))
