"""Losses: golden numbers, closed forms, loops over pairs, symmetries, tiles."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conjoin.encoders.losses import ALONE, Among, infonce, matryoshka, prefix, sigmoid, tiled, triplet

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())
GROUP = [0, 1, 0, 2, 1, 0]


def unit(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(values, dim=1)


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.arange(24, dtype=torch.float64).reshape(6, 4)
    return unit((1 + k).sin()).requires_grad_(), unit((1 + k).sin() + 0.5 * (2 * k).cos()).requires_grad_()


def random_pairs(seed: int, rows: int, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (unit(torch.randn(rows, dim, generator=generator, dtype=torch.float64)) for _ in range(2))
    return a, b


def symmetric(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float, among: Among = ALONE) -> torch.Tensor:
    return (infonce(a, b, scale, among=among) + infonce(b, a, scale, among=among)) / 2


def parameter(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def grad(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_symmetric_infonce_golden() -> None:
    x, y = golden_inputs()
    log_scale, golden = parameter(math.log(1 / 0.07)), GOLDEN["symmetric"]
    loss = symmetric(x, y, log_scale.exp())
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-12)
    assert grad(log_scale).item() == pytest.approx(golden["dloss_dlogscale"], rel=1e-9)
    assert grad(x).norm().item() == pytest.approx(golden["grad_x_norm"], rel=1e-12)
    assert grad(y).norm().item() == pytest.approx(golden["grad_y_norm"], rel=1e-12)


def test_one_way_golden() -> None:
    x, y = golden_inputs()
    scale, golden = parameter(20.0), GOLDEN["one_way"]
    loss = infonce(x, y, scale)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-12)
    assert grad(scale).item() == pytest.approx(golden["dloss_dscale"], rel=1e-9)


def test_sigmoid_golden() -> None:
    x, y = golden_inputs()
    golden = GOLDEN["sigmoid"]
    scale, bias = parameter(golden["scale"]), parameter(golden["bias"])
    loss = sigmoid(x, y, scale, bias)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-12)
    assert grad(scale).item() == pytest.approx(golden["dloss_dscale"], rel=1e-9)
    assert grad(bias).item() == pytest.approx(golden["dloss_dbias"], rel=1e-9)
    assert grad(x).norm().item() == pytest.approx(golden["grad_x_norm"], rel=1e-12)
    assert grad(y).norm().item() == pytest.approx(golden["grad_y_norm"], rel=1e-12)


@pytest.mark.parametrize("margin", ["0.1", "0.2", "0.5"])
def test_hardest_triplet_golden(margin: str) -> None:
    x, y = golden_inputs()
    loss = triplet(x, y, float(margin)) + triplet(y, x, float(margin))
    assert loss.item() == pytest.approx(GOLDEN["triplet_hardest_by_margin"][margin], rel=1e-12)


def test_matryoshka_golden() -> None:
    x, y = golden_inputs()
    for dim, golden in GOLDEN["symmetric_on_prefixes"].items():
        found = symmetric(prefix(x, int(dim)), prefix(y, int(dim)), 1 / 0.07)
        assert found.item() == pytest.approx(golden, rel=1e-12)
    wrapped = matryoshka(partial(infonce, scale=1 / 0.07), [4, 2, 1])
    both = (wrapped(x, y, among=ALONE) + wrapped(y, x, among=ALONE)) / 2
    assert both.item() == pytest.approx(sum(GOLDEN["symmetric_on_prefixes"].values()), rel=1e-12)
    weighed = matryoshka(partial(infonce, scale=20.0), [4, 1], [0.5, 2.0])(x, y, among=ALONE)
    alone = [infonce(prefix(x, dim), prefix(y, dim), 20.0).item() for dim in (4, 1)]
    assert weighed.item() == pytest.approx(0.5 * alone[0] + 2 * alone[1], rel=1e-12)


@pytest.mark.parametrize("rows", [2, 64, 512])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_identical_embeddings_give_log_of_the_batch(rows: int, scale: float) -> None:
    same = unit(torch.ones(rows, 3))
    assert symmetric(same, same, scale).item() == pytest.approx(math.log(rows), rel=1e-5)


@pytest.mark.parametrize("rows", [2, 4, 16])
def test_orthonormal_aligned_infonce(rows: int) -> None:
    eye = torch.eye(rows, dtype=torch.float64)
    scale = 1 / 0.07
    assert symmetric(eye, eye, scale).item() == pytest.approx(math.log1p((rows - 1) * math.exp(-scale)))


@pytest.mark.parametrize(
    ("rows", "value"), [(4, 0.6932833772575959), (8, 0.6934649728544633), (16, 0.6938281640481982)]
)
def test_orthonormal_aligned_sigmoid(rows: int, value: float) -> None:
    eye = torch.eye(rows, dtype=torch.float64)
    assert sigmoid(eye, eye, 10.0, -10.0).item() == pytest.approx(value, rel=1e-14)
    assert value == pytest.approx(math.log(2) + (rows - 1) * math.log1p(math.exp(-10)))


def test_sigmoid_of_orthogonal_vectors_at_the_start() -> None:
    apart = torch.eye(1024, dtype=torch.float64)
    assert sigmoid(apart[:512], apart[512:], 10.0, -10.0).item() == pytest.approx(10.023244236399036, rel=1e-12)


def test_a_duplicated_pair_is_a_false_negative_until_grouped() -> None:
    eye, group = torch.eye(4, dtype=torch.float64)[[0, 0, 2, 3]], torch.tensor([7, 7, 1, 2])
    assert symmetric(eye, eye, 100.0).item() == pytest.approx(2 * math.log(2) / 4)
    assert symmetric(eye, eye, 100.0, among=Among(group_N=group)).item() == pytest.approx(0, abs=1e-12)
    assert sigmoid(eye, eye, 50.0, -25.0).item() == pytest.approx(25 * 2 / 4, rel=1e-6)
    for same in ("mask", "positive"):
        assert sigmoid(eye, eye, 50.0, -25.0, among=Among(group_N=group, same=same)).item() == pytest.approx(
            0, abs=1e-9
        )
    assert triplet(eye, eye, 0.5).item() == pytest.approx(0.5 * 2 / 4)
    assert triplet(eye, eye, 0.5, among=Among(group_N=group)).item() == 0


def infonce_loop(a: torch.Tensor, b: torch.Tensor, group: list[int] | None, same: str) -> float:
    logits, total = (8 * a @ b.T).tolist(), 0.0
    for i in range(len(a)):
        mates = [j for j in range(len(b)) if group is not None and group[j] == group[i]] or [i]
        right = mates if same == "positive" else [i]
        counted = [j for j in range(len(b)) if j in right or j not in mates]
        bottom = math.log(sum(math.exp(logits[i][j]) for j in counted))
        total += sum(bottom - logits[i][j] for j in right) / len(right)
    return total / len(a)


def sigmoid_loop(a: torch.Tensor, b: torch.Tensor, group: list[int] | None, same: str) -> float:
    logits, total = (8 * a @ b.T - 3).tolist(), 0.0
    for i in range(len(a)):
        for j in range(len(b)):
            mate = i != j and group is not None and group[i] == group[j]
            if mate and same == "mask":
                continue
            sign = 1 if i == j or mate else -1
            total += math.log1p(math.exp(-sign * logits[i][j]))
    return total / len(a)


def triplet_loop(a: torch.Tensor, b: torch.Tensor, group: list[int] | None, same: str, negatives: str) -> float:
    similar, total = (a @ b.T).tolist(), 0.0
    for i in range(len(a)):
        mates = [j for j in range(len(b)) if group is not None and group[j] == group[i]] or [i]
        positive = min(similar[i][j] for j in mates) if same == "positive" else similar[i][i]
        wrong = [similar[i][j] for j in range(len(b)) if j not in mates]
        semi = [value for value in wrong if value < positive]
        chosen = max(wrong) if negatives == "hardest" else max(semi) if semi else min(wrong)
        total += max(0.0, 0.3 - positive + chosen)
    return total / len(a)


@pytest.mark.parametrize("group", [None, GROUP])
@pytest.mark.parametrize("same", ["mask", "positive"])
def test_equal_the_loops(group: list[int] | None, same: str) -> None:
    a, b = random_pairs(3, 6)
    among = Among(group_N=None if group is None else torch.tensor(group), same=same)  # type: ignore[arg-type]
    assert infonce(a, b, 8.0, among=among).item() == pytest.approx(infonce_loop(a, b, group, same), rel=1e-12)  # type: ignore[arg-type]
    assert sigmoid(a, b, 8.0, -3.0, among=among).item() == pytest.approx(sigmoid_loop(a, b, group, same), rel=1e-12)  # type: ignore[arg-type]
    for negatives in ("hardest", "semi-hard"):
        found = triplet(a, b, 0.3, negatives=negatives, among=among).item()  # type: ignore[arg-type]
        assert found == pytest.approx(triplet_loop(a, b, group, same, negatives), rel=1e-12)


def test_semi_hard_differs_from_hardest_where_a_negative_is_nearer_than_the_positive() -> None:
    a, b = random_pairs(3, 6)
    assert triplet(a, b, 0.3, negatives="semi-hard").item() < triplet(a, b, 0.3).item()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), rows=st.integers(1, 9), scale=st.floats(0.5, 100), shift=st.integers(0, 8))
def test_symmetries(seed: int, rows: int, scale: float, shift: int) -> None:
    a, b = random_pairs(seed, rows)
    order = torch.arange(rows).roll(shift)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    losses: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        partial(symmetric, scale=scale),
        partial(sigmoid, scale=scale, bias=-2.0),
        lambda a, b: triplet(a, b, 0.2) + triplet(b, a, 0.2),
    ]
    for loss in losses:
        value = loss(a, b)
        assert value >= -1e-12
        torch.testing.assert_close(loss(b, a), value)
        torch.testing.assert_close(loss(a[order], b[order]), value)
        torch.testing.assert_close(loss(a @ turn, b @ turn), value)
    torch.testing.assert_close(symmetric(a, b, scale, among=Among(group_N=torch.arange(rows))), symmetric(a, b, scale))


LOSSES = {
    "infonce": lambda a, b, scale, **at: infonce(a, b, scale, **at),
    "sigmoid": lambda a, b, scale, **at: sigmoid(a, b, scale, -3.0, **at),
    "triplet": lambda a, b, scale, **at: triplet(a, b, 0.3, **at) + 0 * scale,
    "matryoshka": lambda a, b, scale, **at: matryoshka(partial(infonce, scale=scale), [5, 2])(a, b, **at),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tile", [1, 2, 3, 100])
def test_tiles_give_the_whole_loss_and_every_gradient(loss: str, tile: int) -> None:
    group = torch.tensor([0, 1, 0, 2, 3, 1, 4])

    def tile_loss(rows: slice, given: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        a, b, scale = given
        yield LOSSES[loss](a[rows], b, scale, among=Among(rows.start, group))

    found = []
    for size in (7, tile):
        a, b = (value.requires_grad_() for value in random_pairs(4, 7))
        scale = parameter(9.0)
        value = tiled(tile_loss, 7, size, [a, b, scale])  # type: ignore[arg-type]
        (2 * value).backward()
        found.append([value, grad(a), grad(b), grad(scale)])
    for whole, tiles in zip(*found, strict=True):
        torch.testing.assert_close(tiles, whole, rtol=1e-12, atol=1e-14)


def test_a_second_backward_through_tiles_is_refused() -> None:
    a, b = (value.requires_grad_() for value in random_pairs(4, 7))
    value = tiled(lambda rows, given: [infonce(given[0][rows], given[1], 9.0, among=Among(rows.start))], 7, 2, [a, b])
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_large_scale_and_masks_keep_gradients_finite() -> None:
    a, b = (features.float().requires_grad_() for features in random_pairs(5, 4))
    scale, one_group = torch.tensor(100.0, requires_grad=True), torch.tensor([1, 1, 1, 1])
    total = symmetric(a, b, scale, among=Among(group_N=one_group)) + sigmoid(
        a, b, scale, -10.0, among=Among(group_N=one_group)
    )
    total = (
        total
        + triplet(a, b, 0.2, among=Among(group_N=one_group))
        + triplet(a, b, 0.2, negatives="semi-hard", among=Among(group_N=one_group))
    )
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(grad(scale))
    assert torch.isfinite(grad(a)).all()


def test_autocast_does_not_lower_the_precision() -> None:
    a, b = (features.float() for features in random_pairs(6, 32, 64))
    expected = symmetric(a, b, 100.0), sigmoid(a, b, 100.0, -10.0), triplet(a, b, 0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = symmetric(a, b, 100.0), sigmoid(a, b, 100.0, -10.0), triplet(a, b, 0.2)
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == torch.float32
        assert left.item() == right.item()


def test_a_batch_without_pairs_costs_nothing_and_keeps_gradients_finite() -> None:
    nothing, scale = torch.zeros(0, 4, requires_grad=True), torch.tensor(10.0, requires_grad=True)
    group = torch.zeros(0, dtype=torch.int64)
    loss = symmetric(nothing, nothing, scale, among=Among(group_N=group)) + sigmoid(
        nothing, nothing, scale, -10.0, among=Among(group_N=group)
    )
    (loss + triplet(nothing, nothing, 0.2, among=Among(group_N=group))).backward()
    assert loss.item() == 0
    assert grad(scale).item() == 0
