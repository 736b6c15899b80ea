"""Training checkpoints: what is written comes back, the newest two are kept, a torn one is passed over."""

from __future__ import annotations

from pathlib import Path

import torch

from conjoin.pipeline.checkpoints import Checkpoint, Progressed, newest, write


def checkpoint(step: int) -> Checkpoint:
    tensors = {"head.weight": torch.full((2, 3), float(step)), "optimizer.head.weight.step": torch.tensor(step)}
    log = [{"step": number + 1, "loss": 1 / (number + 1)} for number in range(step)]
    return Checkpoint(Progressed(step, 1, 0.5), tensors, log)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    assert newest(str(tmp_path)) is None
    write(str(tmp_path), checkpoint(7))
    found = newest(str(tmp_path))
    assert found is not None
    assert found.progressed == Progressed(7, 1, 0.5)
    assert found.log == checkpoint(7).log
    for name, value in checkpoint(7).tensors.items():
        assert found.tensors[name].equal(value)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(str(tmp_path), checkpoint(step))
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == [2, 10]


def test_a_torn_one_is_passed_over(tmp_path: Path) -> None:
    for step in (3, 4):
        write(str(tmp_path), checkpoint(step))
    torn = tmp_path / "0000000004" / "tensors.safetensors"
    torn.write_bytes(torn.read_bytes()[:-5])
    found = newest(str(tmp_path))
    assert found is not None
    assert found.progressed.step == 3
    (tmp_path / "0000000003" / "state.json").unlink()
    assert newest(str(tmp_path)) is None
