"""The joint encoder: unit vectors of one modality at a time, the scale and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conjoin.encoders.joint import JointEncoder, build
from conjoin.encoders.options import TowerOptions
from conjoin.encoders.spec import EncoderSpec

TOWERS = {"image": TowerOptions(size_px=16, width=8), "text": TowerOptions(width=16, max_tokens=8)}
CAPTIONS = ["red apple", "green pear"]


@pytest.fixture(scope="module")
def encoder() -> JointEncoder:
    return build(TOWERS, 8, CAPTIONS)


def test_encode_gives_unit_vectors(encoder: JointEncoder) -> None:
    for modality, values in (("text", CAPTIONS), ("image", [np.zeros((16, 16, 3), dtype=np.uint8)] * 2)):
        vectors = encoder.encode(modality, encoder.collate(modality, values))
        assert vectors.shape == (2, 8)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_encode_is_features_then_project(encoder: JointEncoder) -> None:
    inputs = encoder.collate("text", CAPTIONS)
    features = encoder.features("text", inputs)
    assert features.shape == (2, encoder.spec.towers["text"].width)
    torch.testing.assert_close(encoder.project("text", features), encoder.encode("text", inputs))


def test_vectors_are_float32_under_autocast(encoder: JointEncoder) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        vectors = encoder.encode("text", encoder.collate("text", CAPTIONS))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_double_stays_double() -> None:
    encoder = build(TOWERS, 8, CAPTIONS).double()
    assert encoder.encode("text", encoder.collate("text", CAPTIONS)).dtype == torch.float64
    pixels = [np.zeros((16, 16, 3), dtype=np.uint8)]
    assert encoder.encode("image", encoder.collate("image", pixels)).dtype == torch.float64


def test_scale_starts_at_clips_and_is_kept_in_bounds() -> None:
    encoder = build(TOWERS, 8, CAPTIONS)
    assert encoder.scale("text", "image").item() == pytest.approx(1 / 0.07)
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        encoder.log_scales["image_text"].data.fill_(start)
        encoder.clamp_scales_()
        assert encoder.log_scales["image_text"].item() == pytest.approx(end)
    assert not list(encoder.biases)


def test_a_sigmoid_encoder_has_a_bias_and_no_upper_bound() -> None:
    encoder = build(TOWERS, 8, CAPTIONS, "sigmoid")
    assert encoder.scale("image", "text").item() == pytest.approx(10)
    assert encoder.bias("image", "text").item() == -10
    encoder.log_scales["image_text"].data.fill_(math.log(112.3))  # as in a released SigLIP
    encoder.clamp_scales_()
    assert encoder.scale("image", "text").item() == pytest.approx(112.3)


def test_a_triplet_encoder_has_nothing_to_scale() -> None:
    encoder = build(TOWERS, 8, CAPTIONS, "triplet")
    assert encoder.scale("image", "text").item() == 1
    assert encoder.bias("image", "text").item() == 0
    assert not list(encoder.log_scales)


def test_every_pair_of_three_towers_has_its_scale() -> None:
    encoder = build({**TOWERS, "audio": TowerOptions(width=16)}, 8, CAPTIONS)
    assert set(encoder.log_scales) == {"audio_image", "audio_text", "image_text"}


def test_order_of_the_towers_does_not_matter() -> None:
    turned = build(dict(reversed(list(TOWERS.items()))), 8, CAPTIONS)
    first = build(TOWERS, 8, CAPTIONS)
    assert list(turned.state_dict()) == list(first.state_dict())
    assert turned.spec.to_json() == first.spec.to_json()


def test_names_are_checked(encoder: JointEncoder) -> None:
    with pytest.raises(ValueError, match="no 'audio' tower; it has image, text"):
        encoder.collate("audio", [])
    with pytest.raises(ValueError, match="video"):
        build({"video": TowerOptions()}, 8)
    with pytest.raises(ValueError, match="none"):
        build({}, 8)
    with pytest.raises(ValueError, match="the spec names"):
        JointEncoder(EncoderSpec(8, {}), {"text": encoder.tower("text")})
