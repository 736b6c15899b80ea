"""An encoder at work in one process: the same vector whatever the neighbours, reasons for what has none."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conjoin.encoders.joint import JointEncoder, build
from conjoin.encoders.options import TowerOptions
from conjoin.pipeline import embedder as module
from conjoin.pipeline.decode import Bad, Decoded, decode
from conjoin.pipeline.embedder import Embedder, load, read_spec
from conjoin.pipeline.errors import BadRecord, EncoderError

CAPTIONS = ["red apple", "a cat on a mat", "blue car", "dog"]
NAN = "\u00a4"


def png(color: str, size: int = 20) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def embedder(small_encoder: Path) -> Embedder:
    return load(small_encoder, device="cpu")


def text_encoder() -> JointEncoder:
    return build({"text": TowerOptions(max_tokens=16, width=16)}, 8, CAPTIONS)


def test_vectors_are_of_unit_length_and_do_not_depend_on_neighbours(embedder: Embedder) -> None:
    together = embedder.encode(text=[*CAPTIONS, "apple " * 40])
    assert together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    for row, caption in enumerate(CAPTIONS):
        assert embedder.encode(text=[caption])[0] == pytest.approx(together[row], abs=1e-5)
    assert (embedder.encode(text=CAPTIONS) == embedder.encode(text=CAPTIONS)).all()


def test_embed_keeps_order_over_chunks_and_embeds_equal_values_once(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TEXT_CHUNK", 2)
    values = ["dog", None, "", "blue car", "dog", "", "red apple", None]
    found = embedder.embed("text", values)
    assert found.present.tolist() == [True, False, False, True, True, False, True, False]
    assert (found.vectors[~found.present] == 0).all()
    assert (found.vectors[0] == found.vectors[4]).all()
    assert found.vectors[3] == pytest.approx(embedder.encode(text=["blue car"])[0], abs=1e-5)
    assert found.bad == (Bad(2, "text", "decode", "empty text"), Bad(5, "text", "decode", "empty text"))


def test_nothing_to_embed(embedder: Embedder) -> None:
    found = embedder.embed("image", [])
    assert (found.vectors.shape, found.present.shape, found.bad) == ((0, 8), (0,), ())
    assert embedder.encode(text=[]).shape == (0, 8)


def test_pictures_bring_their_thumbnails(embedder: Embedder) -> None:
    found = embedder.embed("image", [png("red"), b"", png("red"), png("blue")], thumbnail_px=8)
    assert found.present.tolist() == [True, False, True, True]
    assert found.thumbnails[1] is None
    assert found.thumbnails[0] == found.thumbnails[2] != found.thumbnails[3]
    assert [bad.reason for bad in found.bad] == ["zero bytes"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"text": ["a", ""]}, r"text 1 cannot be embedded \(decode\): empty text"),
        ({"text": ["a", "b", None]}, "text 2 is null"),
        ({"image": ["/nowhere/a.jpg"]}, r"image 0 cannot be embedded \(fetch\): no such file"),
    ],
    ids=["empty", "null", "missing"],
)
def test_encode_names_the_first_value_that_has_no_vector(
    embedder: Embedder, values: dict[str, list[object]], words: str
) -> None:
    with pytest.raises(BadRecord, match=words):
        embedder.encode(**values)


def test_encode_takes_one_modality_that_the_encoder_has(embedder: Embedder) -> None:
    with pytest.raises(EncoderError, match="exactly one modality"):
        embedder.encode(text=["a"], image=["b"])
    with pytest.raises(EncoderError, match="no touch tower; it has audio, image, text"):
        embedder.encode(touch=["a"])


def test_nan_for_one_value_is_that_values_trouble() -> None:
    encoder = text_encoder()
    tower = encoder.tower("text")
    assert tower.tokenizer is not None
    broken = tower.tokenizer.encode(NAN, add_special_tokens=False).ids[-1]
    with torch.no_grad():
        tower.backbone.tokens.weight[broken] = torch.nan  # type: ignore[union-attr, index]
    embedder = Embedder(encoder, device="cpu")
    values = ["dog", f"{NAN} 5", "blue car", f"{NAN} 5"]
    found = embedder.embed("text", values)
    assert found.present.tolist() == [True, False, True, False]
    assert np.isfinite(found.vectors).all()
    assert {bad.reason for bad in found.bad} == {"the encoder gave NaN"}
    assert [(bad.position, bad.stage) for bad in found.bad] == [(1, "embed"), (3, "embed")]
    features = embedder.features("text", decode(embedder.spec.towers["text"], values))
    assert np.isnan(features).all(axis=1).tolist() == [False, True, False, True]


def test_a_vector_without_direction_is_bad() -> None:
    encoder = text_encoder()
    for parameter in encoder.tower("text").head.parameters():
        torch.nn.init.zeros_(parameter)
    found = Embedder(encoder, device="cpu").embed("text", ["a"])
    assert [bad.reason for bad in found.bad] == ["the encoder gave a zero vector"]


def test_several_values_of_one_input_give_the_mean_of_their_vectors(embedder: Embedder) -> None:
    one, other = embedder.encode(text=["dog", "blue car"])
    decoded = Decoded(["dog", "blue car", "dog"], np.array([0, 0, 2]), (), [None] * 3)
    found = embedder.embed_decoded("text", decoded, 3)
    mean = (one + other) / np.linalg.norm(one + other)
    assert found.vectors[0] == pytest.approx(mean, abs=1e-5)
    assert found.vectors[2] == pytest.approx(one, abs=1e-5)
    assert found.present.tolist() == [True, False, True]


def _hungry(limit: int) -> Callable[..., None]:
    """A hook that asks for memory that no machine has, for batches above `limit` rows."""

    def hook(_module: object, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        if len(inputs["input_ids"]) > limit:
            torch.empty(1 << 60, dtype=torch.uint8)

    return hook


def test_a_batch_that_does_not_fit_into_memory_is_halved() -> None:
    encoder = text_encoder()
    calm = Embedder(encoder, device="cpu").encode(text=CAPTIONS)
    encoder.tower("text").backbone.register_forward_pre_hook(_hungry(1), with_kwargs=True)
    assert Embedder(encoder, device="cpu").encode(text=CAPTIONS) == pytest.approx(calm, abs=1e-5)


def test_a_value_that_does_not_fit_alone_is_bad() -> None:
    encoder = text_encoder()
    encoder.tower("text").backbone.register_forward_pre_hook(_hungry(0), with_kwargs=True)
    found = Embedder(encoder, device="cpu").embed("text", ["a", "b"])
    assert [bad.reason for bad in found.bad] == ["out of memory for this value alone"] * 2


def _no_giants(_module: object, _args: object, inputs: dict[str, torch.Tensor]) -> None:
    """A hook that asks for memory that no machine has once a text of more than 12 tokens is in the batch."""
    if inputs["attention_mask"].sum(1).max() > 12:
        torch.empty(1 << 60, dtype=torch.uint8)


def test_a_giant_does_not_fail_its_neighbours() -> None:
    encoder = text_encoder()
    values = [f"dog {n}" for n in range(40)]
    calm = Embedder(encoder, device="cpu").encode(text=values)
    encoder.tower("text").backbone.register_forward_pre_hook(_no_giants, with_kwargs=True)
    values.insert(17, "apple " * 40)
    found = Embedder(encoder, device="cpu").embed("text", values)
    assert found.bad == (Bad(17, "text", "embed", "out of memory for this value alone"),)
    assert np.flatnonzero(~found.present).tolist() == [17]
    assert np.delete(found.vectors, 17, 0) == pytest.approx(calm, abs=1e-5)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (np.zeros, True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("in Python"), True),
    ],
    ids=["python", "numpy", "cuda", "cublas", "shapes", "with-words"],
)
def test_only_a_lack_of_memory_is_met_by_halving(error: object, is_memory: bool) -> None:
    def hook(_module: object, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        if len(inputs["input_ids"]) > 1:
            if error is np.zeros:
                np.zeros(1 << 60, np.uint8)
            assert isinstance(error, Exception)
            raise error

    encoder = text_encoder()
    encoder.tower("text").backbone.register_forward_pre_hook(hook, with_kwargs=True)
    embedder = Embedder(encoder, device="cpu")
    if is_memory:
        assert embedder.embed("text", CAPTIONS).present.all()
        return
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        embedder.embed("text", CAPTIONS)


def test_half_precision_stays_near(small_encoder: Path, embedder: Embedder) -> None:
    half = load(small_encoder, device="cpu", precision="bf16").encode(text=CAPTIONS)
    assert half.dtype == np.float32
    assert (half * embedder.encode(text=CAPTIONS)).sum(1).min() > 0.99


def test_the_spec_is_read_without_weights(small_encoder: Path, embedder: Embedder, tmp_path: Path) -> None:
    shutil.copy(small_encoder / "spec.json", tmp_path / "spec.json")
    spec, fingerprint = read_spec(tmp_path)
    assert (spec, fingerprint) == (embedder.spec, embedder.fingerprint)


@pytest.mark.parametrize("spoil", ["spec.json", "model.safetensors"])
def test_a_torn_encoder_is_named(small_encoder: Path, tmp_path: Path, spoil: str) -> None:
    shutil.copytree(small_encoder, tmp_path / "encoder")
    path = tmp_path / "encoder" / spoil
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EncoderError, match=rf"not a usable encoder.*{spoil}.*Train one"):
        load(tmp_path / "encoder")


def test_a_missing_encoder_is_named(tmp_path: Path) -> None:
    for read in (load, read_spec):
        with pytest.raises(EncoderError, match=r"no encoder there .*gone.*Train one"):
            read(tmp_path / "gone")
