"""InfoNCE: golden numbers, closed forms, a five-line loop, symmetries, and exact gradients over ranks."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conjoin.encoders.losses import infonce, symmetric_infonce

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "infonce.json").read_text())
RANKS = Path(__file__).with_name("gloo_ranks.py")


def unit(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(values, dim=1)


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.arange(24, dtype=torch.float64).reshape(6, 4)
    return unit((1 + k).sin()).requires_grad_(), unit((1 + k).sin() + 0.5 * (2 * k).cos()).requires_grad_()


def random_pairs(seed: int, rows: int, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (unit(torch.randn(rows, dim, generator=generator, dtype=torch.float64)) for _ in range(2))
    return a, b


def loop(a: torch.Tensor, b: torch.Tensor, scale: float, group: list[int] | None = None) -> float:
    total = 0.0
    for i in range(len(a)):
        negatives = [j for j in range(len(b)) if j == i or group is None or group[j] != group[i]]
        total += math.log(sum(math.exp(scale * float(a[i] @ b[j])) for j in negatives)) - scale * float(a[i] @ b[i])
    return total / len(a)


def test_symmetric_golden() -> None:
    x, y = golden_inputs()
    log_scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    loss = symmetric_infonce(x, y, log_scale.exp())
    loss.backward()
    golden = GOLDEN["symmetric"]
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-12)
    assert log_scale.grad is not None
    assert log_scale.grad.item() == pytest.approx(golden["dloss_dlogscale"], rel=1e-9)
    assert x.grad is not None
    assert x.grad.norm().item() == pytest.approx(golden["grad_x_norm"], rel=1e-12)
    assert y.grad is not None
    assert y.grad.norm().item() == pytest.approx(golden["grad_y_norm"], rel=1e-12)


def test_one_way_golden() -> None:
    x, y = golden_inputs()
    assert infonce(x, y, 20.0).item() == pytest.approx(GOLDEN["one_way"]["loss"], rel=1e-12)


@pytest.mark.parametrize("rows", [2, 64, 512])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_identical_embeddings_give_log_of_the_batch(rows: int, scale: float) -> None:
    same = unit(torch.ones(rows, 3))
    assert symmetric_infonce(same, same, scale).item() == pytest.approx(math.log(rows), rel=1e-5)


@pytest.mark.parametrize("rows", [2, 4, 16])
def test_orthonormal_aligned_closed_form(rows: int) -> None:
    eye = torch.eye(rows, dtype=torch.float64)
    scale = 1 / 0.07
    assert symmetric_infonce(eye, eye, scale).item() == pytest.approx(math.log1p((rows - 1) * math.exp(-scale)))


def test_a_duplicated_pair_is_a_false_negative_until_grouped() -> None:
    eye = torch.eye(4, dtype=torch.float64)[[0, 0, 2, 3]]
    assert symmetric_infonce(eye, eye, 100.0).item() == pytest.approx(2 * math.log(2) / 4)
    assert symmetric_infonce(eye, eye, 100.0, torch.tensor([7, 7, 1, 2])).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("group", [None, [0, 0, 1, 2, 1, 0]])
def test_equals_the_loop(group: list[int] | None) -> None:
    a, b = random_pairs(3, 6)
    expected = (loop(a, b, 8.0, group) + loop(b, a, 8.0, group)) / 2
    found = symmetric_infonce(a, b, 8.0, None if group is None else torch.tensor(group))
    assert found.item() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), rows=st.integers(1, 9), scale=st.floats(0.5, 100), shift=st.integers(0, 8))
def test_symmetries(seed: int, rows: int, scale: float, shift: int) -> None:
    a, b = random_pairs(seed, rows)
    loss = symmetric_infonce(a, b, scale)
    order = torch.arange(rows).roll(shift)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    assert loss >= -1e-12
    torch.testing.assert_close(symmetric_infonce(b, a, scale), loss)
    torch.testing.assert_close(symmetric_infonce(a[order], b[order], scale), loss)
    torch.testing.assert_close(symmetric_infonce(a @ turn, b @ turn, scale), loss)
    torch.testing.assert_close(symmetric_infonce(a, b, scale, torch.arange(rows)), loss)


def test_rows_with_an_offset_are_shares_of_the_whole() -> None:
    a, b = random_pairs(4, 7)
    group = torch.tensor([0, 1, 0, 2, 3, 1, 4])
    whole = infonce(a, b, 9.0, group_N=group)
    shares = [infonce(a[i:j], b, 9.0, offset=i, group_N=group) for i, j in ((0, 3), (3, 3), (3, 7))]
    torch.testing.assert_close(torch.stack(shares).sum(), whole)


def test_large_scale_and_masks_keep_gradients_finite() -> None:
    a, b = (features.float().requires_grad_() for features in random_pairs(5, 4))
    scale = torch.tensor(100.0, requires_grad=True)
    symmetric_infonce(a, b, scale, torch.tensor([1, 1, 1, 1])).backward()
    assert scale.grad is not None
    assert torch.isfinite(scale.grad)
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()


def test_autocast_does_not_lower_the_precision() -> None:
    a, b = (features.float() for features in random_pairs(6, 32, 64))
    expected = symmetric_infonce(a, b, 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = symmetric_infonce(a, b, 100.0)
    assert found.dtype == torch.float32
    assert found.item() == expected.item()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_sum_to_one_process_exactly(world: int, tmp_path: Path) -> None:
    """The loss alone would also be right with a gather that has no gradient; the gradients would not."""
    commands = [
        [sys.executable, str(RANKS), str(rank), str(world), str(tmp_path / "store"), str(tmp_path / f"{rank}.pt")]
        for rank in range(world)
    ]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait(timeout=120) == 0
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    spec = importlib.util.spec_from_file_location("gloo_ranks", RANKS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = module.gradients(0, 1)
    assert set(shares[0]) == set(expected) == {
        "loss", "left.weight", "left.bias", "right.weight", "right.bias", "log_scale",
    }  # fmt: skip
    for name, whole in expected.items():
        summed = torch.stack([share[name] for share in shares]).sum(0)
        error = (summed - whole).norm() / whole.norm()
        assert error <= 1e-10, f"{name}: relative error {error:.1e}"


def test_a_batch_without_pairs_costs_nothing_and_keeps_gradients_finite() -> None:
    nothing, scale = torch.zeros(0, 4, requires_grad=True), torch.tensor(10.0, requires_grad=True)
    loss = symmetric_infonce(nothing, nothing, scale, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert scale.grad is not None
    assert scale.grad.item() == 0
