"""Evaluation on Ray: a split embedded by a pool of actors, and ranking cut over tasks, against this process alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.jobs.config import read_run_file
from conjoin.jobs.tasks import evaluate
from conjoin.pipeline import held_out, ranking
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.embedder import load
from conjoin.pipeline.errors import EncoderError, SourceError
from conjoin.pipeline.evaluate import evaluate_split
from conjoin.pipeline.held_out import HeldOut, embedded
from conjoin.pipeline.progress import Progress
from conjoin.pipeline.ranking import Side, ranked
from conjoin.pipeline.source import group_values, list_source, python_values, read_rows, split_of, values_of

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def catalog(things: Any, run_file: Callable[..., Path], tmp_path: Path) -> Catalog:
    """Things in two files of several row groups; half of them held out for the test, none for validation."""
    for name, rows in (("a", things.rows.slice(0, 70)), ("b", things.rows.slice(70))):
        pq.write_table(rows, tmp_path / f"{name}.parquet", row_group_size=25)
    config = read_run_file(run_file(f"{tmp_path}/*.parquet", split={"validation": 0, "test": 0.5}), [], None)
    return Catalog(config.name, config.source, str(config.encoder), config.table, config.embed).absolute()


def in_this_process(catalog: Catalog) -> tuple[list[str], dict[str, list[Any]]]:
    """Ids and vectors of the test split by a plain loop in the source's order; None where a value is not usable."""
    embedder, source = load(catalog.encoder), catalog.source
    ids: list[str] = []
    vectors: dict[str, list[Any]] = {"image": [], "text": []}
    for file in list_source(source):
        for number in range(len(file.row_groups)):
            rows = read_rows(source, file.path, number, ["id", "picture", "caption"])
            rows = rows.filter(pa.array(split_of(group_values(source, rows), source.split) == "test"))
            ids += rows["id"].to_pylist()
            for modality, kept in vectors.items():
                found = embedder.embed(modality, python_values(values_of(source, rows, modality)))
                kept += [v if there else None for v, there in zip(found.vectors, found.present, strict=True)]
    return ids, vectors


@pytest.mark.parametrize("actors", [1, 2])
def test_a_pool_of_actors_gives_what_one_process_gives(
    catalog: Catalog, actors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "_READ_ROWS", 7)
    wanted = replace(catalog, embed=catalog.embed.model_copy(update={"actors": actors}))
    seen: list[Progress] = []
    rows = embedded(HeldOut(wanted, "test", label="price"), progress=seen.append)
    assert rows is not None
    ids, vectors = in_this_process(catalog)
    assert rows["group"].to_pylist() == ids
    assert rows["label"].null_count == 0
    for modality, expected in vectors.items():
        found = rows[f"{modality}_vec"].to_pylist()
        assert [v is None for v in found] == [v is None for v in expected]
        assert 0 < sum(v is None for v in found) < 10
        both = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None]
        assert np.abs(np.array([a for a, _ in both]) - np.array([b for _, b in both])).max() < 1e-6
    last = {event.step: (event.done, event.total) for event in seen}
    assert last == {"select": (120, 120), "embed": (len(ids), len(ids))}


def test_the_number_of_actors_changes_no_bit(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "_READ_ROWS", 7)
    # Of as many threads each: an actor has its share of the cores, and some CPUs round otherwise in more threads.
    pool_for = held_out.pool_for
    monkeypatch.setattr(held_out, "pool_for", lambda *given: replace(pool_for(*given), threads=1))
    one, two = (
        embedded(HeldOut(replace(catalog, embed=catalog.embed.model_copy(update={"actors": n})), "test"))
        for n in (1, 2)
    )
    assert one is not None
    assert one.equals(two)


def sides(num_queries: int, num_candidates: int) -> tuple[Side, Side]:
    """Coarse vectors in shuffled groups: many scores are equal, and many right ones."""
    rng = np.random.default_rng(0)
    vectors = [rng.integers(-2, 3, (num, 16)).astype(np.float32) for num in (num_queries, num_candidates)]
    groups = [rng.integers(0, 500, num) for num in (num_queries, num_candidates)]
    groups[1][:500] = np.arange(500)
    return Side(vectors[0], groups[0]), Side(vectors[1], groups[1])


def test_ranking_over_tasks_gives_the_same_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, candidates = sides(3000, 9000)
    here = ranked(queries, candidates)
    monkeypatch.setattr(ranking, "SHARDED_SCORES", 0)
    seen: list[Progress] = []
    there = ranked(queries, candidates, progress=seen.append)
    for name in ("above_Q", "tied_Q", "right_Q"):
        assert getattr(here, name).tolist() == getattr(there, name).tolist(), name
    assert (here.right_Q > 1).any()
    assert [event.done for event in seen][-1] == 3000
    assert len(seen) > 2


def test_what_cannot_be_ranked_is_an_error_over_tasks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, candidates = sides(600, 600)
    monkeypatch.setattr(ranking, "SHARDED_SCORES", 0)
    with pytest.raises(ValueError, match="no right candidate"):
        ranked(Side(queries.vectors_ND, queries.groups_N + 1_000_000), candidates)


def test_a_split_from_the_run_file(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "SHARDED_SCORES", 0)
    config = read_run_file(tmp_path / "conjoin.yaml", [], None)
    found = evaluate(config, "test", classify="price", queries=20)
    direction = found.direction("text", "image")
    assert direction.num_queries == 20 < direction.num_distinct < direction.num_candidates < 75
    assert found.zero_shot is not None
    whole = evaluate(config, "test", queries=0).direction("text", "image")
    assert whole.num_queries == whole.num_distinct == direction.num_distinct


def test_an_empty_split_and_a_missing_encoder_are_named(catalog: Catalog) -> None:
    with pytest.raises(SourceError, match="validation split has no rows"):
        evaluate_split(catalog, "validation")
    with pytest.raises(EncoderError, match="nowhere"):
        evaluate_split(replace(catalog, encoder="/nowhere/at/all"), "test")
