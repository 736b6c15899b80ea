"""exact= and recall=: what they change, and that it is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.index import Setting
from conjoin.pipeline.query.effort import DEFAULT, EXACT, Effort, wanted_effort
from conjoin.pipeline.query.relations import Relation

TOP = "SELECT DIST AS d FROM things ORDER BY d LIMIT 10"


def recall(things: Any, **options: Any) -> float:
    shares = []
    for seed in range(30):
        query = things.query(seed)
        expected = things.exactly(TOP, query)["d"].to_numpy()
        shares.append(float((things.answered(TOP, query, **options)["d"].to_numpy() <= expected[-1] + 1e-6).mean()))
    return float(np.mean(shares))


def test_exact_is_exact(things: Any) -> None:
    assert recall(things, exact=True) == recall(things, recall=1.0) == 1.0


def test_less_recall_is_less_work(things: Any) -> None:
    steps = {wanted: things.explained(TOP, recall=wanted).steps[0] for wanted in (0.5, 0.9, 0.995)}
    work = [step.candidates * step.probes for step in steps.values()]
    assert work == sorted(work)
    assert work[0] < work[-1]
    assert recall(things, recall=0.5) >= 0.5
    assert recall(things, recall=0.9) >= 0.9
    assert recall(things, recall=0.995) >= 0.99


def test_a_recall_is_measured_once(things: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from conjoin.pipeline.query import effort

    things.answered(TOP, things.query(), recall=0.8)
    monkeypatch.setattr(effort, "_tuned", None)
    things.answered(TOP, things.query(), recall=0.8)


@pytest.mark.parametrize("wanted", [0, -0.5, 1.01, 99])
def test_a_recall_is_a_share(things: Any, wanted: float) -> None:
    with pytest.raises(QueryError, match="recall is a share"):
        things.table.sql("SELECT 1", recall=wanted)


def test_words_for_efforts() -> None:
    assert wanted_effort(exact=False, recall=None) == DEFAULT
    assert wanted_effort(exact=True, recall=0.5) == wanted_effort(exact=False, recall=1.0) == EXACT
    assert wanted_effort(exact=False, recall=0.9) == Effort(recall=0.9)


def test_a_default_search_is_as_the_index_measured() -> None:
    relation = Relation("things", pa.schema([]))
    measured = {"image_vec": Setting(8, 2, 40), "text_vec": Setting(30, 4, 40)}
    assert DEFAULT.applied(relation, measured) == measured
    assert EXACT.applied(relation, measured) == {}
