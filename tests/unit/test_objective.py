"""The objective over ranks, pairs and micro-batches: every gradient equals that of one process on the whole batch."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conjoin.encoders.losses import infonce, sigmoid
from conjoin.encoders.objective import Encoded, Objective

RANKS = Path(__file__).with_name("gloo_ranks.py")


@cache
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gloo_ranks", RANKS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gloo_ranks"] = module
    spec.loader.exec_module(module)
    return module


CASES = list(toy().CASES)
Gradients = dict[str, torch.Tensor]


@cache
def whole(case: str) -> Gradients:
    """One process, the whole batch in one forward pass, the loss in one tile."""
    plain = replace(toy().CASES[case], micro=0)
    found: Gradients = toy().gradients(0, 1, replace(plain, objective=replace(plain.objective, tile_elements=1 << 21)))
    return found


@pytest.fixture(scope="module")
def by_world(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Gradients]]]:
    """Per number of ranks what each rank found, all started at once."""
    folder, processes = tmp_path_factory.mktemp("ranks"), []
    for world in (2, 3):
        for rank in range(world):
            out = folder / f"{world}-{rank}.pt"
            command = [sys.executable, str(RANKS), str(rank), str(world), str(folder / f"store{world}"), str(out)]
            processes.append(subprocess.Popen(command))
    for process in processes:
        assert process.wait(timeout=240) == 0
    return {
        world: [torch.load(folder / f"{world}-{r}.pt", weights_only=True) for r in range(world)] for world in (2, 3)
    }


def errors(found: Gradients, expected: Gradients) -> dict[str, float]:
    assert set(found) == set(expected)
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items() if value.any()}


def summed(shares: list[dict[str, Gradients]], case: str) -> Gradients:
    return {name: torch.stack([share[case][name] for share in shares]).sum(0) for name in shares[0][case]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_sum_to_one_process_exactly(
    world: int, case: str, by_world: dict[int, list[dict[str, Gradients]]]
) -> None:
    found = errors(summed(by_world[world], case), whole(case))
    assert {"loss", "towers.image.weight", "towers.text.bias", "towers.audio.weight"} <= set(found)
    assert max(found.values()) <= 1e-10, found


@pytest.mark.parametrize("world", [2, 3])
def test_a_gather_without_gradient_has_the_right_loss_and_is_caught(
    world: int, by_world: dict[int, list[dict[str, Gradients]]]
) -> None:
    found = errors(summed(by_world[world], "without gradient"), whole("infonce"))
    assert found["loss"] <= 1e-10
    assert found["towers.image.weight"] > 0.1


@pytest.mark.parametrize("case", [name for name in CASES if " by " in name])
def test_micro_batches_and_tiles_give_the_gradient_of_the_whole_batch(case: str) -> None:
    assert max(errors(toy().gradients(0, 1, toy().CASES[case]), whole(case)).values()) <= 1e-10


def test_naive_accumulation_is_another_objective_and_is_caught() -> None:
    """The losses of parts, averaged, as gradient accumulation does it."""
    case, module = toy().CASES["infonce"], toy()
    model = module.Toy()
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(9).split(3):
        vectors = {
            name: torch.cat([part() for part in module._parts(model, case, rows, name)]) for name in module.WIDTHS
        }
        encoded = {name: Encoded(found, module.PRESENT[name][rows]) for name, found in vectors.items()}
        total = total + case.objective.share(encoded, model, module.GROUP[rows]) / 3
    total.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    wrong = errors({"loss": total.detach(), **found}, whole("infonce"))
    assert wrong["loss"] > 0.1
    assert wrong["towers.image.weight"] > 0.1


def encoded(rows: int, present: dict[str, list[bool]]) -> dict[str, Encoded]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, there in present.items():
        vectors = torch.nn.functional.normalize(torch.randn(rows, 4, generator=generator, dtype=torch.float64), dim=1)
        found[name] = Encoded(vectors[torch.tensor(there)], torch.tensor(there))
    return found


def test_a_pair_is_over_the_records_that_have_both() -> None:
    found = encoded(4, {"image": [True, True, False, True], "text": [True, False, True, True]})
    share = Objective().share(found, toy().Toy(), torch.arange(4))
    image, text = found["image"].vectors_BD[[0, 2]], found["text"].vectors_BD[[0, 2]]
    scale = toy().Toy().scale("image", "text")
    assert share.item() == pytest.approx(((infonce(image, text, scale) + infonce(text, image, scale)) / 2).item())


def test_weights_choose_and_weigh_pairs() -> None:
    weights = {frozenset(("text", "image")): 3.0, frozenset(("audio", "image")): 1.0}
    assert Objective(weights=weights).pairs(["image", "text", "audio"]) == {
        ("image", "text"): 0.75,
        ("image", "audio"): 0.25,
    }
    assert len(Objective().pairs(["image", "text", "audio"])) == 3


def test_no_pair_with_both_modalities_costs_nothing() -> None:
    found = encoded(2, {"image": [True, False], "text": [False, True]})
    assert Objective().share(found, toy().Toy(), torch.arange(2)).item() == 0


@pytest.mark.parametrize("rows", [8, 512])
def test_chance_is_what_vectors_that_are_all_alike_earn(rows: int) -> None:
    same = torch.nn.functional.normalize(torch.ones(rows, 3, dtype=torch.float64), dim=1)
    best = min(sigmoid(same, same, 0.0, bias).item() for bias in torch.linspace(-8, -1, 281).tolist())
    assert Objective(loss="sigmoid").chance(rows) == pytest.approx(best, rel=1e-4)
    assert Objective().chance(rows) == pytest.approx(math.log(rows))
    alike = {name: Encoded(same, torch.ones(rows, dtype=torch.bool)) for name in ("image", "text")}
    triplet = Objective(loss="triplet", margin=0.3)
    assert triplet.share(alike, toy().Toy(), torch.arange(rows)).item() == pytest.approx(triplet.chance(rows))
