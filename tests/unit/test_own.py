"""Backbones of a user's own: importable again, or refused with a reason."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from conjoin.encoders import own
from conjoin.encoders.checkpoint import fingerprint, load, save
from conjoin.encoders.joint import build
from conjoin.encoders.options import TowerOptions

SOURCE = """
import torch
from torch import nn

class Flat(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.arguments = {"width": width}
        self.layer = nn.Linear(16 * 16 * 3, width)

    def forward(self, pixel_values):
        return self.layer(pixel_values.flatten(1))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5000, 10)

    def forward(self, input_ids, attention_mask):
        return self.table(input_ids)

class Forgetful(Flat):
    def __init__(self, width=12):
        super().__init__(width)
        self.arguments = {}

class NotNumbers(nn.Module):
    arguments = {"what": object()}
"""
CAPTIONS = ["a red apple", "a green pear", "two blue shoes"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "my_towers.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_towers", raising=False)
    importlib.invalidate_caches()
    return importlib.import_module("my_towers")


def test_an_encoder_with_own_towers_is_saved_and_loaded(mine: ModuleType, tmp_path: Path) -> None:
    options = {"image": TowerOptions(size_px=16), "text": TowerOptions(max_tokens=8)}
    encoder = build(options, 6, CAPTIONS, backbones={"image": mine.Flat(20), "text": mine.Words()})
    assert encoder.spec.towers["image"].width == 20
    assert encoder.spec.towers["text"].pooling == "mean"
    save(encoder, tmp_path / "encoder")
    again = load(tmp_path / "encoder")
    pixels = [np.full((16, 16, 3), 100, np.uint8)]
    for name, values in (("image", pixels), ("text", CAPTIONS)):
        left, right = (e.encode(name, e.collate(name, values)) for e in (encoder, again))
        torch.testing.assert_close(left, right)


def test_the_source_is_in_the_fingerprint_and_a_changed_one_is_refused(mine: ModuleType, tmp_path: Path) -> None:
    def made(module: ModuleType) -> str:
        torch.manual_seed(0)
        options = {"image": TowerOptions(size_px=16), "text": TowerOptions(max_tokens=8)}
        encoder = build(options, 6, CAPTIONS, backbones={"image": module.Flat()})
        save(encoder, tmp_path / "encoder")
        return fingerprint(encoder)

    before = made(mine)
    assert made(mine) == before
    save_copy = tmp_path / "old"
    (tmp_path / "encoder").rename(save_copy)
    (tmp_path / "my_towers.py").write_text(SOURCE + "\n# a change\n")
    import linecache

    linecache.checkcache()
    assert made(importlib.reload(mine)) != before
    with pytest.raises(ValueError, match=r"my_towers:Flat has changed since the encoder was trained"):
        load(save_copy)


@pytest.mark.parametrize(
    ("backbone", "said"),
    [("Forgetful", r"has other parameters.*set its `arguments`"), ("NotNumbers", "`arguments` are not JSON")],
)
def test_a_module_that_cannot_be_made_again_is_refused(mine: ModuleType, backbone: str, said: str) -> None:
    given = mine.Forgetful(30) if backbone == "Forgetful" else mine.NotNumbers()
    with pytest.raises(ValueError, match=said):
        own.describe(given)


def test_a_local_class_is_refused() -> None:
    class Local(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="define it at the top level of a module file"):
        own.describe(Local())


@pytest.mark.parametrize("name", ["subprocess:Popen", "os:system", "no_such_module:Thing", "torch.nn:functional"])
def test_a_spec_cannot_call_what_is_no_network(name: str) -> None:
    with pytest.raises(ValueError, match=r"no torch\.nn\.Module|cannot be imported"):
        own.rebuild({"class": name, "source": "", "arguments": {"args": "true"}})


def test_a_backbone_for_a_missing_modality_is_an_error(mine: ModuleType) -> None:
    with pytest.raises(ValueError, match="the source has no audio"):
        build({"image": TowerOptions(size_px=16)}, 6, backbones={"audio": mine.Flat()})
    with pytest.raises(ValueError, match="leave one of them out"):
        build({"image": TowerOptions("efficientnet-lite0")}, 6, backbones={"image": mine.Flat()})
