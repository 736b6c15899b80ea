"""Shared, expensive things, started once a session: Ray, an S3 server, a tiny encoder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip with the reason where there is none."""
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))
