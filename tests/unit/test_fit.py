"""The loop without Ray: any number of ranks, replicated or sharded, any micro-batch, resumed across layouts."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conjoin.pipeline.errors import TrainError
from conjoin.pipeline.fit import Step
from conjoin.pipeline.forward import Place

SCRIPT = Path(__file__).with_name("gloo_loop.py")
ALONE = Place(0, 1, torch.device("cpu"), "float32")
Tensors = dict[str, torch.Tensor]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gloo_loop", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = _load()


def ranks(folder: Path, world: int, parallel: str, steps: int) -> list[subprocess.Popen[bytes]]:
    folder.mkdir(exist_ok=True)
    store = folder / f"store-{parallel}-{steps}"
    words = [str(world), str(store), str(folder), parallel, str(steps)]
    return [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), *words]) for rank in range(world)]


def finished(processes: list[subprocess.Popen[bytes]]) -> None:
    """Waits for all of them before it complains of one."""
    codes = [process.wait(timeout=240) for process in processes]
    assert not any(codes), codes


def differences(found: Tensors, expected: Tensors) -> float:
    assert set(found) == set(expected)
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, list[float]]:
    """One process, the whole batch in one pass: tensors and losses after five steps of two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    loop = made.loop(folder, ALONE, 100)
    made.train_to(loop, 5)
    return made.save(loop, folder), [record["loss"] for record in loop.log]


@pytest.fixture(scope="module")
def after_three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a checkpoint of step 3, made by two ranks, one folder per layout."""
    folder = tmp_path_factory.mktemp("three")
    running = [ranks(folder / parallel, 2, parallel, 3) for parallel in ("ddp", "fsdp")]
    for processes in running:
        finished(processes)
    return {parallel: folder / parallel for parallel in ("ddp", "fsdp")}


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_change_nothing(micro: int, whole: tuple[Tensors, list[float]], tmp_path: Path) -> None:
    loop = made.loop(tmp_path, ALONE, micro)
    made.train_to(loop, 5)
    assert differences(made.save(loop, tmp_path), whole[0]) < 1e-9


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_run_of_two_ranks_goes_on_alone(
    layout: str, after_three: dict[str, Path], whole: tuple[Tensors, list[float]], tmp_path: Path
) -> None:
    shutil.copytree(after_three[layout] / "checkpoints", tmp_path / "checkpoints")
    loop = made.loop(tmp_path, ALONE, 3)
    assert loop.progressed.step == 3
    made.train_to(loop, 5)
    assert differences(made.save(loop, tmp_path), whole[0]) < 1e-9
    assert [record["loss"] for record in loop.log] == pytest.approx(whole[1], rel=1e-9)


def test_a_checkpoint_of_one_layout_goes_on_in_the_other(
    after_three: dict[str, Path], whole: tuple[Tensors, list[float]], tmp_path: Path
) -> None:
    running = []
    for before, after in (("ddp", "fsdp"), ("fsdp", "ddp")):
        folder = tmp_path / after
        shutil.copytree(after_three[before] / "checkpoints", folder / "checkpoints")
        running.append(ranks(folder, 2, after, 5))
    for processes in running:
        finished(processes)
    for after in ("ddp", "fsdp"):
        for rank in (0, 1):
            found = torch.load(tmp_path / after / f"{rank}.pt", weights_only=True)
            assert differences(found["tensors"], whole[0]) < 1e-9, (after, rank)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid", "triplet"])
def test_every_loss_goes_down(loss: str, tmp_path: Path) -> None:
    loop = made.loop(tmp_path, ALONE, 100, loss=loss, epochs=8, warmup=0.0, global_batch_size=22)
    made.train_to(loop, 8)
    losses = [record["loss"] for record in loop.log]
    assert losses[-1] < losses[0]
    assert {"image_grad_norm", "text_grad_norm", "image_alike", "lr", "chance_loss"} <= set(loop.log[0])
    assert ("image_text_scale" in loop.log[0]) == (loss != "triplet")


def test_a_batch_that_is_not_finite_is_named_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"id": [f"r{i}" for i in range(made.NUM_ROWS)]}), "made.parquet")
    loop = made.loop(tmp_path, ALONE, 100)
    with torch.no_grad():
        next(iter(loop.encoder.tower("text").parameters())).fill_(float("nan"))
    with pytest.raises(TrainError, match=r"not finite at step 1.*not_finite\.json"):
        made.train_to(loop, 1)
    found = json.loads((tmp_path / "not_finite.json").read_text())
    assert found["step"] == 1
    assert found["ids"] == [f"r{row}" for row in loop._global_rows(0)]


def test_callbacks_see_each_step_and_can_stop_it(tmp_path: Path) -> None:
    seen: list[Step] = []

    def callback(step: Step) -> bool:
        seen.append(step)
        return step.step == 2

    loop = made.loop(tmp_path, ALONE, 100, [callback])
    made.train_to(loop, 2)
    for step, record in enumerate(loop.log):
        loop._tell(step, record, lambda records: None)
    assert [step.step for step in seen] == [1, 2]
    assert sorted([*seen[0].rows, *seen[1].rows]) == sorted([*loop._global_rows(0), *loop._global_rows(1)])
    assert loop.stopping


def test_a_moving_average_goes_on_where_it_was(tmp_path: Path) -> None:
    from conjoin.pipeline.checkpoints import newest

    averages = []
    for name, stops in (("whole", [5]), ("broken", [3, 5])):
        for stop in stops:
            loop = made.loop(tmp_path / name, ALONE, 100, ema=0.9)
            made.train_to(loop, stop)
            made.save(loop, tmp_path / name)
        found = newest(f"{tmp_path / name}/checkpoints")
        assert found is not None
        averages.append({key: value for key, value in found.tensors.items() if key.startswith("ema.")})
    assert differences(averages[1], averages[0]) < 1e-9
    assert {key.removeprefix("ema.") for key in averages[0]} == set(loop.trained)
    before = {name: p.detach().clone() for name, p in loop.trained.items()}
    with loop.averaged():
        swapped = {f"ema.{name}": p.detach().clone() for name, p in loop.trained.items()}
    assert differences(swapped, averages[0]) < 1e-9
    assert differences({name: p.detach() for name, p in loop.trained.items()}, before) == 0


def test_a_run_that_was_stopped_early_does_not_go_on(tmp_path: Path) -> None:
    from dataclasses import replace

    loop = made.loop(tmp_path, ALONE, 100)
    made.train_to(loop, 2)
    loop.progressed = replace(loop.progressed, stopped=True)
    made.save(loop, tmp_path)
    again = made.loop(tmp_path, ALONE, 100)
    said: list[object] = []
    assert again.run(said.append).step == 2
    assert said == [again.log]
