"""One rank of test_objective.py: `python gloo_ranks.py RANK WORLD STORE OUT` writes every case's share and gradients.

Assumes: rows are given out unevenly, one rank of three has none, and two records lack a modality.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from conjoin.encoders import cached, ranks
from conjoin.encoders.joint import pair_name
from conjoin.encoders.objective import Encoded, Objective
from conjoin.encoders.transforms import drop_features

ROWS = {1: [9], 2: [5, 4], 3: [5, 0, 4]}
WIDTHS = {"image": 5, "text": 6, "audio": 3}
GROUP = torch.tensor([0, 1, 0, 2, 3, 1, 4, 5, 0])
PRESENT = {
    "image": torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 1]).bool(),
    "text": torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1]).bool(),
    "audio": torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1]).bool(),
}


@dataclass(frozen=True, slots=True)
class Case:
    """An objective, rows of a forward pass (0: all) and the share of features dropped per row."""

    objective: Objective
    micro: int = 0
    dropout: float = 0.0


def _product(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Somebody's own loss, which looks at groups and scale: nothing but squares."""
    target = (group[:, None] == group[None, :]).to(a.dtype)
    return ((scale / 10 * a @ b.T - target) ** 2).sum() / max(len(a), 1)


OBJECTIVES = {
    "infonce": Objective(),
    "infonce-positive": Objective(same_group="positive"),
    "infonce-negative": Objective(same_group="negative"),
    "sigmoid": Objective(loss="sigmoid"),
    "sigmoid-positive": Objective(loss="sigmoid", same_group="positive"),
    "hardest": Objective(loss="triplet"),
    "semi-hard": Objective(loss="triplet", negatives="semi-hard", same_group="positive"),
    "matryoshka": Objective(matryoshka=(4, 2)),
    "graph": Objective(weights={frozenset(("text", "image")): 3.0, frozenset(("audio", "text")): 1.0}),
    "own": Objective(custom=_product),
}
CASES = {name: Case(objective) for name, objective in OBJECTIVES.items()}
CASES |= {f"infonce by {micro}": Case(OBJECTIVES["infonce"], micro) for micro in (1, 3, 5)}
CASES |= {f"dropout by {micro}": Case(OBJECTIVES["infonce"], micro, 0.4) for micro in (0, 1, 3, 5)}
CASES |= {"sigmoid by 3": Case(OBJECTIVES["sigmoid"], 3), "matryoshka by 3": Case(OBJECTIVES["matryoshka"], 3)}
CASES |= {"tiles by 3": Case(replace(OBJECTIVES["infonce"], tile_elements=16), 3)}


class Toy(nn.Module):
    """Linear encoders with scales and biases in float64: the smallest thing with every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleDict({name: nn.Linear(width, 4).double() for name, width in WIDTHS.items()})
        self.log_scales = nn.Parameter(torch.tensor([2.0, 1.5, 1.8], dtype=torch.float64))
        self.biases = nn.Parameter(torch.tensor([-3.0, -2.0, -4.0], dtype=torch.float64))

    def scale(self, a: str, b: str) -> torch.Tensor:
        return self.log_scales[_pair(a, b)].exp()

    def bias(self, a: str, b: str) -> torch.Tensor:
        return self.biases[_pair(a, b)]


def _pair(a: str, b: str) -> int:
    return ["audio_image", "audio_text", "image_text"].index(pair_name(a, b))


def _parts(toy: Toy, case: Case, rows: torch.Tensor, name: str) -> list[cached.Part]:
    generator = torch.Generator().manual_seed(WIDTHS[name])
    inputs = torch.randn(9, WIDTHS[name], generator=generator, dtype=torch.float64)
    there = rows[PRESENT[name][rows]]

    def part(some: torch.Tensor) -> torch.Tensor:
        features = drop_features(inputs[some], some, case.dropout)
        return nn.functional.normalize(toy.towers[name](features), dim=1)

    return [lambda some=some: part(some) for some in there.split(case.micro or 9)]  # type: ignore[misc]


def gradients(rank: int, world: int, case: Case) -> dict[str, torch.Tensor]:
    """This rank's share of the loss and of every gradient."""
    start = sum(ROWS[world][:rank])
    rows = torch.arange(9)[start : start + ROWS[world][rank]]
    toy = Toy()

    def share_of(vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        encoded = {name: Encoded(found, PRESENT[name][rows]) for name, found in vectors.items()}
        return case.objective.share(encoded, toy, GROUP[rows])

    parts = {name: _parts(toy, case, rows, name) for name in WIDTHS}
    loss = cached.backward(parts, share_of, torch.device("cpu"))
    found = {name: parameter.grad for name, parameter in toy.named_parameters() if parameter.grad is not None}
    return {"loss": loss, **found}


def _without_gradient(local_BD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    parts = list(ranks.gather(local_BD.detach(), counts).split(list(counts)))
    parts[dist.get_rank()] = local_BD
    return torch.cat(parts)


def main() -> None:
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {name: gradients(rank, world, case) for name, case in CASES.items()}
    # the classic mistake, to show that the comparison sees it: other ranks' rows are constants
    right, ranks.gather_with_grad = ranks.gather_with_grad, _without_gradient
    found["without gradient"] = gradients(rank, world, CASES["infonce"])
    ranks.gather_with_grad = right
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
