"""Encoder folders: equal after reloading, named by a fingerprint, and refused when torn, altered or too new."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conjoin.encoders import checkpoint
from conjoin.encoders.joint import JointEncoder, build
from conjoin.encoders.options import TowerOptions

CAPTIONS = ["red apple", "green pear", "a cat on a mat"]


def tiny(**image: Any) -> JointEncoder:
    towers = {
        "image": TowerOptions(**{"size_px": 16, "width": 8, **image}),
        "text": TowerOptions(width=16, max_tokens=8),
        "audio": TowerOptions(width=8, max_s=1.0, head="mlp"),
    }
    return build(towers, 8, CAPTIONS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(tiny(), tmp_path / "encoder", {"epochs": 3})
    return tmp_path / "encoder"


def test_reloaded_encoder_gives_equal_vectors(folder: Path) -> None:
    values: dict[str, list[Any]] = {
        "text": CAPTIONS,
        "image": [np.full((16, 16, 3), shade, dtype=np.uint8) for shade in (0, 200)],
        "audio": [np.sin(np.arange(5_000, dtype=np.float32))],
    }
    first, again = tiny(), checkpoint.load(folder)
    assert not again.training
    for modality, rows in values.items():
        inputs = first.collate(modality, rows)
        torch.testing.assert_close(
            again.encode(modality, again.collate(modality, rows)), first.encode(modality, inputs), rtol=0, atol=0
        )


def test_fingerprint_is_the_same_in_memory_on_disk_and_reloaded(folder: Path) -> None:
    name = checkpoint.fingerprint(tiny())
    assert len(name) == 32
    assert int(name, 16) >= 0
    assert checkpoint.read_spec(folder) == (tiny().spec, name)
    assert checkpoint.fingerprint(checkpoint.load(folder)) == name


def test_metadata_is_kept_and_not_fingerprinted(folder: Path, tmp_path: Path) -> None:
    assert json.loads((folder / "spec.json").read_text())["metadata"] == {"epochs": 3}
    assert checkpoint.save(tiny(), tmp_path / "other", {"epochs": 4}) == checkpoint.read_spec(folder)[1]


@pytest.mark.parametrize("change", ["weight", "scale", "transform", "tokenizer", "head"])
def test_fingerprint_covers(change: str) -> None:
    encoder = tiny(head="mlp") if change == "head" else tiny()
    if change == "weight":
        next(encoder.tower("image").parameters()).data.view(-1)[0] += 1e-6
    elif change == "scale":
        encoder.log_scales["image_text"].data += 1e-6
    elif change == "transform":
        tower = encoder.spec.towers["image"]
        towers = {**encoder.spec.towers, "image": replace(tower, transform=replace(tower.transform, fit="crop"))}
        encoder.spec = replace(encoder.spec, towers=towers)
    elif change == "tokenizer":
        tokenizer = encoder.tower("text").tokenizer
        assert tokenizer is not None
        tokenizer.enable_truncation(7)
    assert checkpoint.fingerprint(encoder) != checkpoint.fingerprint(tiny())


def test_backbone_fingerprint_ignores_the_head_alone() -> None:
    name = checkpoint.backbone_fingerprint(tiny().tower("image"))
    assert checkpoint.backbone_fingerprint(tiny(head="mlp").tower("image")) == name
    assert checkpoint.backbone_fingerprint(tiny(size_px=24).tower("image")) != name
    assert checkpoint.backbone_fingerprint(tiny(seed=1).tower("image")) != name


def test_backbone_fingerprint_covers_the_tokenizer() -> None:
    tower, other = tiny().tower("text"), tiny().tower("text")
    assert other.tokenizer is not None
    other.tokenizer.enable_truncation(7)
    assert checkpoint.backbone_fingerprint(tower) != checkpoint.backbone_fingerprint(other)


def test_saving_replaces_an_older_folder_whole(folder: Path) -> None:
    (folder / "left.over").write_text("x")
    name = checkpoint.save(tiny(seed=1), folder)
    assert checkpoint.read_spec(folder)[1] == name
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "spec.json", "text.tokenizer.json"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_save_leaves_the_older_folder(folder: Path) -> None:
    name = checkpoint.read_spec(folder)[1]
    with pytest.raises(TypeError):
        checkpoint.save(tiny(seed=1), folder, {"bad": object()})  # type: ignore[dict-item]  # what a bug would pass
    assert checkpoint.fingerprint(checkpoint.load(folder)) == name
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["model.safetensors", "spec.json", "text.tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "torn", "empty"])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(content[: len(content) // 2 if damage == "torn" else 0])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        checkpoint.load(folder)


def test_an_altered_weight_is_noticed(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: altered"):
        checkpoint.load(folder)


def test_an_altered_tokenizer_is_noticed(folder: Path) -> None:
    path = folder / "text.tokenizer.json"
    path.write_text(path.read_text().replace('"Lowercase"', '"NFC"'))
    with pytest.raises(ValueError, match=r"text\.tokenizer\.json: altered"):
        checkpoint.load(folder)


def test_an_altered_spec_is_noticed(folder: Path) -> None:
    path = folder / "spec.json"
    stored = json.loads(path.read_text())
    stored["spec"]["towers"]["image"]["transform"]["fit"] = "crop"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"spec\.json: altered"):
        checkpoint.load(folder)


def test_a_newer_format_is_refused(folder: Path) -> None:
    path = folder / "spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(ValueError, match=r"format 2.*upgrade"):
        checkpoint.read_spec(folder)


def test_reading_a_spec_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from conjoin.encoders.checkpoint import read_spec\n"
        f"read_spec(Path({str(folder)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
