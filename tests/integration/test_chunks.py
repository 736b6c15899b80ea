"""Rows decoded by Ray's CPU tasks are those decoded in place, also where no CPU is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline import chunks as module
from conjoin.pipeline.chunks import Chunk, Piece, Recipe, chunks
from conjoin.pipeline.embedder import read_spec
from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.stager import pieces_of

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def job(things: Any, things_encoder: Path, tmp_path: Path) -> tuple[Recipe, list[Piece]]:
    """Rows 10 to 99 of the things in pieces of at most 25, row groups of 40."""
    pq.write_table(things.rows, tmp_path / "things.parquet", row_group_size=40)
    source = SourceConfig(path=str(tmp_path), id="id", image="picture", text="caption", keep=["price"])
    place = {"file": [0] * 90, "row_group": [n // 40 for n in range(10, 100)], "row": [n % 40 for n in range(10, 100)]}
    rows = pa.table({**{name: pa.array(values) for name, values in place.items()}, "id": things.ids[10:100]})
    schema = pa.schema([("id", pa.string()), ("price", pa.float64())])
    towers = read_spec(things_encoder)[0].towers
    return Recipe(source, towers, schema, 16), list(pieces_of(rows, [str(tmp_path / "things.parquet")], 25))


def shown(found: Iterator[Chunk]) -> list[tuple[object, ...]]:
    return [
        (
            chunk.start,
            chunk.columns.to_pylist(),
            chunk.decoded["text"].values,
            [value.tobytes() for value in chunk.decoded["image"].values if not isinstance(value, str)],
            chunk.decoded["image"].owners.tolist(),
            [(bad.position, bad.reason) for bad in chunk.decoded["image"].bad],
            chunk.decoded["image"].thumbnails,
        )
        for chunk in found
    ]


@pytest.mark.parametrize("ahead", [1, 3])
def test_tasks_decode_the_same_chunks(job: tuple[Recipe, list[Piece]], ahead: int) -> None:
    recipe, pieces = job
    assert len(pieces) == 5
    found = shown(chunks(recipe, pieces, ahead))
    assert found == shown(chunks(recipe, pieces, 0))
    assert [row["id"] for _, columns, *_ in found for row in columns] == [
        key for piece in pieces for key in piece.ids.to_pylist()
    ]


def test_an_error_in_a_task_is_ours(job: tuple[Recipe, list[Piece]]) -> None:
    recipe, pieces = job
    torn = Piece(pieces[1].path, pieces[1].row_group, pieces[1].start, pieces[1].rows, pieces[0].ids.slice(0, 25))
    with pytest.raises(SourceError, match="ids differ from the plan"):
        list(chunks(recipe, [pieces[0], torn], 2))


def test_without_a_free_cpu_the_actor_decodes_itself(
    job: tuple[Recipe, list[Piece]], monkeypatch: pytest.MonkeyPatch, all_cpus_taken: Callable[[], None]
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.5)
    expected = shown(chunks(*job, 0))
    all_cpus_taken()
    assert shown(chunks(*job, 2)) == expected


@pytest.fixture
def all_cpus_taken() -> Iterator[Callable[[], None]]:
    import ray

    class Holder:
        def ready(self) -> None: ...

    holders: list[ray.actor.ActorHandle] = []

    def take() -> None:
        cpus = int(ray.cluster_resources()["CPU"])
        holders.extend(ray.remote(Holder).options(num_cpus=1).remote() for _ in range(cpus))
        ray.get([holder.ready.remote() for holder in holders])

    yield take
    for holder in holders:
        ray.kill(holder)
