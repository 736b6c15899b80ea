"""What is said before a training starts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conjoin.pipeline.preflight import Preflight

AHEAD = Preflight(
    rows=5000,
    groups=4000,
    validation_rows=200,
    repeated_texts=0.3,
    unmasked_texts=0.02,
    steps=50,
    steps_per_epoch=5,
    global_batch_size=1024,
    workers=1,
    parameters=10_000_000,
    trained_parameters=2_000_000,
    bytes_per_row=1 << 20,
    memory_bytes=1_200_000_000,
)


def test_the_line_names_batch_steps_memory_and_what_is_frozen() -> None:
    assert AHEAD.facts() == {
        "rows": "5,000",
        "steps": "50 of 1,024",
        "frozen": "80% of 10.0M parameters",
        "memory": "1.2 GB a worker",
        "repeated texts": "30%",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [({"unmasked_texts": 0.3}, "each other's negatives"), ({"rows": 1000}, "less than one batch of 1,024")],
)
def test_what_to_look_at_first(change: dict[str, float], said: str) -> None:
    assert not AHEAD.warning()
    assert said in replace(AHEAD, **change).warning()  # type: ignore[arg-type]
