"""Built-in backbones: shapes, and rows that do not see each other or their padding."""

from __future__ import annotations

import pytest
import torch

from conjoin.encoders.backbones import AudioCnn, ImageCnn, TextTransformer


def test_text_shapes_and_padding() -> None:
    torch.manual_seed(0)
    net = TextTransformer(vocabulary=50, max_tokens=12, width=16, num_layers=2)
    ids = torch.randint(0, 50, (1, 5))
    alone = net(ids, torch.ones_like(ids))
    padded = torch.cat([ids, torch.full((1, 4), 7)], dim=1)
    mask = (torch.arange(9) < 5).long()[None]
    assert alone.shape == (1, 5, 16)
    torch.testing.assert_close(net(padded, mask)[:, :5], alone)


@pytest.mark.parametrize("size", [16, 17, 64])
def test_image_rows_are_independent(size: int) -> None:
    torch.manual_seed(0)
    net = ImageCnn(8)
    pixels = torch.randn(3, 3, size, size)
    together = net(pixels)
    assert together.shape == (3, 64)
    torch.testing.assert_close(net(pixels[1:2]), together[1:2])


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 50, 51])
def test_audio_rows_do_not_see_padding(frames: int) -> None:
    torch.manual_seed(0)
    net = AudioCnn(num_mels=10, width=8, num_layers=3).double()
    mel = torch.randn(1, 10, frames, dtype=torch.float64)
    alone = net(mel, torch.tensor([frames]))
    noisy = torch.cat([mel, torch.randn(1, 10, 33, dtype=torch.float64)], dim=2)
    assert alone.shape == (1, 16)
    torch.testing.assert_close(net(noisy, torch.tensor([frames])), alone)


@pytest.mark.parametrize("mode", [True, False])
def test_training_mode_changes_nothing(mode: bool) -> None:
    torch.manual_seed(0)
    net = ImageCnn(8).train(mode)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net(pixels), net.eval()(pixels))
