"""A tiny encoder of three modalities, made once."""

from __future__ import annotations

from pathlib import Path

import pytest


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
