"""A catalog and its table in a bucket, its nights over another endpoint than its readers use; for tests of storage."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop import DATE, row

from conjoin.jobs.config import RunFile
from conjoin.jobs.nightly import run
from conjoin.pipeline import store
from conjoin.pipeline.embedder import load
from conjoin.pipeline.errors import ConjoinError

MOST_TRIES = 12
Rows = tuple[tuple[str, str, float], ...]


@dataclass
class Bucket:
    """A catalog and its table in a bucket: written and read by the good endpoint, its nights run by another one."""

    where: str
    good: str
    encoder: Path
    monkeypatch: pytest.MonkeyPatch
    files: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    errors: list[ConjoinError] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"{self.where}/vectors/things.lance"

    def write(self, **files: list[dict[str, object]]) -> None:
        import s3fs

        fs = s3fs.S3FileSystem(endpoint_url=self.good, key="testing", secret="testing")  # moto's
        for name, rows in files.items():
            self.files[name] = rows
            with fs.open(f"{self.where}/source/{name}.parquet", "wb") as out:
                pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=3)

    def config(self) -> RunFile:
        source = {"path": f"{self.where}/source", "id": "id", "image": "picture", "text": "caption", "keep": ["price"]}
        return RunFile.model_validate(
            {
                "name": "things",
                "source": {**source, "split": {"validation": 0, "test": 0}},
                "encoder": str(self.encoder),
                "table": {"path": self.uri},
                "embed": {"unit_rows": 4},
                "gates": {"row_change": 10, "hit_at_10_drop": 1},
            }
        )

    def wanted(self) -> Rows:
        rows = [(r["id"], r["caption"], r["price"]) for part in self.files.values() for r in part]
        return tuple(sorted(rows))  # type: ignore[arg-type]  # as row() made them

    def live(self) -> pa.Table:
        """What a reader sees, by the good endpoint."""
        import lance

        options = {"aws_endpoint": self.good, "allow_http": "true", "aws_region": "us-east-1"}
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return lance.dataset(self.uri, version=store.LIVE, storage_options={**options, **keys}).to_table()

    def night(self, endpoint: str) -> None:
        """The same command until it finishes; every error on the way is one of ours and leaves `live` as it was."""
        self.monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for _ in range(MOST_TRIES):
            try:
                report = run(self.config(), DATE)
            except ConjoinError as error:
                self.errors.append(error)
                continue
            assert report.status == "published"
            self.check()
            return
        raise AssertionError(f"never finished: {[str(error) for error in self.errors[-MOST_TRIES:]]}")

    def check(self) -> None:
        """Every id once, its values those of the source, its vectors those of the encoder; the head is what is live."""
        table = self.live()
        assert rows_of(table) == self.wanted()
        found = np.array(table["text_vec"].to_pylist(), np.float32)
        np.testing.assert_allclose(found, load(str(self.encoder)).encode(text=table["text"].to_pylist()), atol=1e-6)


def rows_of(table: pa.Table) -> Rows:
    return tuple(sorted(zip(*(table[name].to_pylist() for name in ("id", "text", "price")), strict=True)))


@contextmanager
def reading(bucket: Bucket, allowed: Sequence[Rows]) -> Iterator[None]:
    """A reader that opens `live` again and again: it is always there and always one of the `allowed` catalogs."""
    stop, wrong, looks = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            try:
                found = rows_of(bucket.live())
                looks.append(found)
                if found not in allowed:
                    wrong.append(f"{len(found)} rows that no night published")
            except Exception as error:
                wrong.append(repr(error))
            stop.wait(0.2)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not wrong, wrong[:3]
    assert looks


def change(bucket: Bucket, number: int) -> None:
    """Something new, changed, gone and moved, prices; another catalog for each number."""
    new = [row(100 + number * 10 + n) for n in range(3)]
    bucket.write(
        a=[row(0, caption=f"green {number}"), *(row(n) for n in range(2 + number % 3, 8)), *new],
        b=[row(n, price=number + 0.5) for n in range(8, 14)],
        c=[row(n, caption=f"blue {number}") for n in range(14, 17)] + [row(17)] * (number % 2),
    )
