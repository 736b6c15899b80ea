"""One process's encoder: values in, unit vectors and bad values out; the same inputs give the same vectors.

Assumes: decoding is decode.py's matter; batches are formed from the inputs alone (sorted by length, under a budget), so
that a vector does not depend on who embeds it or when.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from conjoin.encoders.spec import AudioTransform, EncoderSpec, ImageTransform, TextTransform
from conjoin.pipeline import storage
from conjoin.pipeline.decode import Bad, Decoded, decode
from conjoin.pipeline.errors import EncoderError, StorageError

if TYPE_CHECKING:
    import torch

    from conjoin.encoders.joint import JointEncoder
    from conjoin.encoders.spec import TowerSpec
    from conjoin.encoders.towers import Inputs

Precision = Literal["auto", "float32", "bf16"]
_T = TypeVar("_T")
# What one forward pass takes, by kind: tokens, pixels, samples. A GPU takes sixteen times as much.
_BUDGET = {"text": 8_192, "image": 1 << 20, "audio": 1 << 20}
_GPU_FACTOR = 16
_CHARS_PER_TOKEN = 3
_DECODED_AT_ONCE = {"text": 100_000, "image": 512, "audio": 256}


@dataclass(frozen=True, slots=True)
class Embedded:
    """vectors: (N, D) float32, unit length, zero rows where there is none; present: (N,) bool."""

    vectors: NDArray[np.float32]
    present: NDArray[np.bool_]
    bad: tuple[Bad, ...]
    thumbnails: list[bytes | None]


class Embedder:
    """An encoder in evaluation mode on one device."""

    def __init__(
        self, encoder: JointEncoder, fingerprint: str, device: str = "auto", precision: Precision = "auto"
    ) -> None:
        import torch

        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(name)
        self.encoder = encoder.to(self.device).eval()
        self.fingerprint = fingerprint
        self.precision = ("bf16" if self.device.type == "cuda" else "float32") if precision == "auto" else precision

    @property
    def spec(self) -> EncoderSpec:
        return self.encoder.spec

    def embed(self, modality: str, values: Sequence[object], *, thumbnail_px: int = 0) -> Embedded:
        """None, bytes, str, or lists of these, as the source gives them; decoded and embedded in bounded memory."""
        tower = self._tower(modality)
        step = _DECODED_AT_ONCE[tower.kind]
        parts = []
        for start in range(0, len(values), step):
            piece = values[start : start + step]
            decoded = decode(tower, piece, thumbnail_px=thumbnail_px)
            parts.append(self.embed_decoded(modality, decoded, len(piece)))
        if len(parts) == 1:
            return parts[0]
        bad = [
            Bad(item.position + number * step, item.modality, item.stage, item.reason)
            for number, part in enumerate(parts)
            for item in part.bad
        ]
        return Embedded(
            np.concatenate([part.vectors for part in parts] or [np.zeros((0, self.spec.dim), np.float32)]),
            np.concatenate([part.present for part in parts] or [np.zeros(0, bool)]),
            tuple(bad),
            [thumbnail for part in parts for thumbnail in part.thumbnails],
        )

    def embed_decoded(self, modality: str, decoded: Decoded, num_inputs: int) -> Embedded:
        """Decoded values of `num_inputs` inputs; NaN and zero vectors become Bad at stage `embed`."""
        found, bad = self._run(modality, decoded, lambda inputs: self.encoder.encode(modality, inputs), self.spec.dim)
        vectors, present = _by_owner(found, decoded, num_inputs, {item.position for item in bad})
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
        return Embedded(vectors, present, (*decoded.bad, *bad), decoded.thumbnails)

    def features(
        self, modality: str, decoded: Decoded, num_inputs: int
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Pooled backbone outputs (N, W) float32, zero rows where there is none, and which rows are present (N,)."""
        width = self._tower(modality).width
        found, bad = self._run(modality, decoded, lambda inputs: self.encoder.features(modality, inputs), width)
        return _by_owner(found, decoded, num_inputs, {item.position for item in bad})

    def _tower(self, modality: str) -> TowerSpec:
        if modality not in self.spec.towers:
            has = ", ".join(self.spec.towers)
            raise EncoderError(f"the encoder has no {modality} tower", next=f"It embeds {has}")
        return self.spec.towers[modality]

    def _run(
        self, modality: str, decoded: Decoded, forward: Callable[[Inputs], torch.Tensor], width: int
    ) -> tuple[NDArray[np.float32], list[Bad]]:
        """One output row per decoded value; equal values (the same object, or equal text) are computed once."""
        keys = [value if isinstance(value, str) else id(value) for value in decoded.values]
        first: dict[object, int] = {}
        place = np.array([first.setdefault(key, number) for number, key in enumerate(keys)], dtype=np.int64)
        out = np.zeros((len(keys), width), np.float32)
        reasons: dict[int, str] = {}
        for batch in self._batches(
            modality, [decoded.values[number] for number in first.values()], list(first.values())
        ):
            self._forward(modality, batch, decoded, forward, out, reasons)
        wrong = ~np.isfinite(out).all(1) | (np.abs(out).max(1, initial=0) == 0)
        for number in np.flatnonzero(wrong & (place == np.arange(len(place)))).tolist():
            reasons.setdefault(number, "the encoder gave NaN, infinity or a zero vector")
        bad: dict[int, Bad] = {}
        for number, (source, owner) in enumerate(zip(place.tolist(), decoded.owners.tolist(), strict=True)):
            if source in reasons:
                out[number] = 0
                bad.setdefault(owner, Bad(owner, modality, "embed", reasons[source]))
        return out[place], list(bad.values())

    def _batches(self, modality: str, values: Sequence[object], numbers: Sequence[int]) -> Iterator[list[int]]:
        """Sorted by length, as many as the budget allows; a pure function of the values."""
        transform = self._tower(modality).transform
        sizes = np.array([_size(transform, value) for value in values], dtype=np.int64)
        budget = _BUDGET[self._tower(modality).kind] * (_GPU_FACTOR if self.device.type == "cuda" else 1)
        batch: list[int] = []
        for index in np.argsort(sizes, kind="stable").tolist():
            if batch and (len(batch) + 1) * sizes[index] > budget:
                yield batch
                batch = []
            batch.append(numbers[index])
        if batch:
            yield batch

    def _forward(
        self,
        modality: str,
        batch: list[int],
        decoded: Decoded,
        forward: Callable[[Inputs], torch.Tensor],
        out: NDArray[np.float32],
        reasons: dict[int, str],
    ) -> None:
        import torch

        inputs = self.encoder.collate(modality, [decoded.values[number] for number in batch])
        try:
            with torch.inference_mode(), self._autocast():
                moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
                out[batch] = forward(moved).float().cpu().numpy()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(batch) == 1:
                reasons[batch[0]] = "does not fit into the device's memory"
                return
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._forward(modality, half, decoded, forward, out, reasons)

    def _autocast(self) -> AbstractContextManager[object]:
        import torch

        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()


def _size(transform: object, value: object) -> int:
    """About what a value costs: tokens, pixels or samples."""
    if isinstance(transform, TextTransform):
        return min(transform.max_tokens, len(str(value).encode()) // _CHARS_PER_TOKEN + 3)
    if isinstance(transform, ImageTransform):
        return transform.size_px**2
    limit = cast(AudioTransform, transform)
    return min(round(limit.max_s * limit.sample_rate_hz), len(cast("NDArray[np.float32]", value)))


def _by_owner(
    found: NDArray[np.float32], decoded: Decoded, num_inputs: int, without: set[int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The mean of each input's values (N, width), and which inputs have one."""
    sums = np.zeros((num_inputs, found.shape[1]), np.float32)
    counts = np.bincount(decoded.owners, minlength=num_inputs)
    np.add.at(sums, decoded.owners, found)
    present = counts > 0
    if without:
        present[list(without)] = False
    sums[~present] = 0
    shares = 1 / np.maximum(counts, 1).astype(np.float32)
    return sums * shares[:, None], present


def read_spec(uri: str) -> tuple[EncoderSpec, str]:
    """Spec and fingerprint of an encoder folder, local or on a bucket, without torch. Raises EncoderError."""
    from conjoin.encoders import checkpoint

    if not storage.is_s3(uri):
        return _checked(uri, lambda: checkpoint.read_spec(Path(storage.absolute(uri))))
    return _checked(uri, lambda: checkpoint.read_spec(_fetched(uri, spec_only=True)))


def load(uri: str, device: str = "auto", precision: Precision = "auto") -> Embedder:
    """The encoder of a folder; one on a bucket is copied once to a local cache named by its fingerprint.

    Raises EncoderError naming the folder when it is missing, torn or of a newer conjoin.
    """
    from conjoin.encoders import checkpoint

    folder = Path(storage.absolute(uri)) if not storage.is_s3(uri) else _checked(uri, lambda: _fetched(uri))
    _, fingerprint = _checked(uri, lambda: checkpoint.read_spec(folder))
    encoder = _checked(uri, partial(checkpoint.load, folder))
    return Embedder(encoder, fingerprint, device, precision)


def _checked(uri: str, action: Callable[[], _T]) -> _T:
    try:
        return action()
    except (ValueError, StorageError) as error:
        advice = "Name a folder that `conjoin train` made"
        raise EncoderError(f"the encoder cannot be loaded: {error}", where=uri, next=advice) from error


def _fetched(uri: str, *, spec_only: bool = False) -> Path:
    """A local copy, written beside and renamed; spec_only: just spec.json."""
    from conjoin.encoders import checkpoint

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "conjoin" / "encoders"
    beside = cache / f".{uuid.uuid4().hex}"
    beside.mkdir(parents=True)
    try:
        (beside / "spec.json").write_bytes(storage.read_bytes(storage.join(uri, "spec.json")))
        _, fingerprint = checkpoint.read_spec(beside)
        target = cache / (fingerprint + ("-spec" if spec_only else ""))
        if target.is_dir():
            return target
        if not spec_only:
            storage.copy_tree(uri, str(beside))
        try:
            beside.rename(target)
        except OSError:  # another process was first, with the same content
            if not target.is_dir():
                raise
        return target
    finally:
        shutil.rmtree(beside, ignore_errors=True)
