"""An encoder at work in one process: values or decoded values in, unit vectors out; nothing here knows Ray.

Assumes: a value's vector depends on the value and the encoder alone, up to rounding: neither its neighbours in the
list nor the size of the batches change it; the same list on the same machine gives the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from conjoin.encoders.spec import AudioTransform, EncoderSpec, ImageTransform, TowerSpec
from conjoin.pipeline import storage
from conjoin.pipeline.batches import CPU_BUDGET, GPU_BUDGET, Batch, batches
from conjoin.pipeline.decode import Bad, Decoded, decode
from conjoin.pipeline.errors import BadRecord, EncoderError, StorageError

if TYPE_CHECKING:
    import torch

    from conjoin.encoders.joint import JointEncoder

Precision = Literal["auto", "float32", "bf16"]

_TEXT_CHUNK = 65_536
_CHUNK_BYTES = 64 << 20
_UNIT_TOLERANCE = 1e-3
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_FOLDER = "Train one with `conjoin train`, or correct `encoder` in the run file"


@dataclass(frozen=True, slots=True)
class Embedded:
    """vectors: (N, D) float32 of unit length, zero where not `present`; bad: why, for those that are not null."""

    vectors: np.ndarray
    present: np.ndarray
    bad: tuple[Bad, ...]
    thumbnails: list[bytes | None]


class Embedder:
    """Turns values of any of the encoder's modalities into vectors.

    device: auto (a GPU if there is one), cpu, cuda, cuda:1 ... precision: auto is bf16 on a GPU, float32 elsewhere.
    """

    def __init__(self, encoder: JointEncoder, *, device: str = "auto", precision: Precision = "auto") -> None:
        import torch

        from conjoin.encoders.checkpoint import fingerprint

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.precision = precision if precision != "auto" else ("float32" if self.device.type == "cpu" else "bf16")
        self.fingerprint = fingerprint(encoder)
        self.encoder = encoder.to(self.device).eval()

    @property
    def spec(self) -> EncoderSpec:
        return self.encoder.spec

    def chunk(self, modality: str) -> int:
        """How many inputs `embed` decodes at a time: texts by the ten thousand, pictures and sounds by memory."""
        return chunk_size(self._tower_spec(modality))

    def encode(self, **values: Sequence[object]) -> np.ndarray:
        """Vectors (N, D) of one modality's values: encode(text=["red apple"]), encode(image=["a.jpg", data]).

        Raises BadRecord naming the first value that cannot be embedded; a null is one.
        """
        if len(values) != 1:
            raise EncoderError("encode takes exactly one modality", next="For example encode(text=['red apple'])")
        modality, items = next(iter(values.items()))
        found = self.embed(modality, items)
        for bad in found.bad:
            raise BadRecord(f"{modality} {bad.position} cannot be embedded ({bad.stage}): {bad.reason}")
        if not found.present.all():
            raise BadRecord(f"{modality} {int(np.argmin(found.present))} is null")
        return found.vectors

    def embed(self, modality: str, values: Sequence[object], *, thumbnail_px: int = 0) -> Embedded:
        """Decode and embed values (None, bytes, str, lists of these) in chunks that bound memory; equal ones once."""
        tower = self._tower_spec(modality)
        firsts, inverse = _distinct(values)
        parts = []
        for start in range(0, len(firsts), step := chunk_size(tower)):
            some = [values[position] for position in firsts[start : start + step]]
            parts.append(self.embed_decoded(modality, decode(tower, some, thumbnail_px=thumbnail_px), len(some)))
        vectors = np.concatenate([np.zeros((0, self.spec.dim), np.float32), *(part.vectors for part in parts)])
        present = np.concatenate([np.zeros(0, bool), *(part.present for part in parts)])
        starts = np.cumsum([0, *(len(part.present) for part in parts)])
        found = {start + bad.position: bad for start, part in zip(starts, parts, strict=False) for bad in part.bad}
        bad = tuple(
            Bad(position, modality, found[at].stage, found[at].reason)
            for position, at in enumerate(inverse.tolist())
            if at in found
        )
        thumbnails = [thumbnail for part in parts for thumbnail in part.thumbnails]
        return Embedded(vectors[inverse], present[inverse], bad, [thumbnails[at] for at in inverse])

    def embed_decoded(self, modality: str, decoded: Decoded, num_inputs: int) -> Embedded:
        """Vectors of `num_inputs` inputs from their decoded values; equal contents are embedded once.

        Several values of one input give the renormalised mean of their vectors. A vector that is not finite or has no
        direction makes its input bad.
        """
        firsts, inverse = _distinct(decoded.values)
        unique_VD, failed = self._run(modality, [decoded.values[first] for first in firsts], "encode", self.spec.dim)
        norms_V = np.linalg.norm(unique_VD, axis=1)
        for position in np.flatnonzero(~(np.abs(norms_V - 1) < _UNIT_TOLERANCE)):
            is_zero = norms_V[position] == 0
            failed.setdefault(int(position), "the encoder gave a zero vector" if is_zero else "the encoder gave NaN")
        vectors, owners = np.zeros((num_inputs, self.spec.dim), np.float32), decoded.owners
        counts = np.bincount(owners, minlength=num_inputs)
        single = counts[owners] == 1
        vectors[owners[single]] = unique_VD[inverse[single]]
        reasons = {int(owners[at]): failed[int(i)] for at, i in enumerate(inverse) if int(i) in failed}
        for owner in np.flatnonzero(counts > 1):
            mean_D = unique_VD[inverse[owners == owner]].mean(axis=0)
            norm = float(np.linalg.norm(mean_D))
            if norm < _UNIT_TOLERANCE:
                reasons.setdefault(int(owner), "the vectors of the list cancel out")
            vectors[owner] = mean_D / max(norm, _UNIT_TOLERANCE)
        vectors[list(reasons)] = 0
        present = counts > 0
        present[list(reasons)] = False
        bad = [*decoded.bad, *(Bad(owner, modality, "embed", reason) for owner, reason in reasons.items())]
        bad.sort(key=lambda item: item.position)
        return Embedded(vectors, present, tuple(bad), decoded.thumbnails)

    def features(self, modality: str, decoded: Decoded) -> np.ndarray:
        """The frozen backbone's output (V, W) float32, one row per decoded value; NaN where it failed."""
        firsts, inverse = _distinct(decoded.values)
        width = self._tower_spec(modality).width
        features_VW, failed = self._run(modality, [decoded.values[first] for first in firsts], "features", width)
        features_VW[list(failed)] = np.nan
        return features_VW[inverse]

    def _tower_spec(self, modality: str) -> TowerSpec:
        if modality not in self.spec.towers:
            has = ", ".join(self.spec.towers)
            raise EncoderError(f"the encoder has no {modality} tower; it has {has}", where=self.fingerprint)
        return self.spec.towers[modality]

    def _run(
        self, modality: str, values: Sequence[str | np.ndarray], method: Literal["encode", "features"], width: int
    ) -> tuple[np.ndarray, dict[int, str]]:
        """encoder.method(modality, inputs) over all values: (V, width) float32, and the reasons of rows that failed."""
        import torch

        function = partial(getattr(self.encoder, method), modality)
        kind = self._tower_spec(modality).kind
        budget = (CPU_BUDGET if self.device.type == "cpu" else GPU_BUDGET)[kind]
        found: list[tuple[np.ndarray, torch.Tensor]] = []
        failed: dict[int, str] = {}
        with torch.inference_mode(), self._autocast():
            for batch in batches(self.encoder.tower(modality), values, budget):
                # Results stay on the device: a copy per batch would make it wait for the CPU's next one.
                found += self._fitting(batch, function, failed)
        result = np.zeros((len(values), width), np.float32)
        for rows, output in found:
            result[rows] = output.float().cpu().numpy()
        return result, failed

    def _fitting(
        self, batch: Batch, function: Callable[[dict[str, torch.Tensor]], torch.Tensor], failed: dict[int, str]
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """The batch's output; if memory runs out, that of its halves, down to single rows, which then fail."""
        import torch

        try:
            inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.inputs.items()}
            output = function(inputs)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        else:
            yield batch.rows, output
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch.rows) == 1:
            failed[int(batch.rows[0])] = "out of memory for this value alone"
            return
        for half in batch.halves():
            yield from self._fitting(half, function, failed)

    def _autocast(self) -> torch.autocast:
        import torch

        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def chunk_size(tower: TowerSpec) -> int:
    """Inputs that may be decoded at a time within 64 MB of pixels or samples; texts are small."""
    transform = tower.transform
    if isinstance(transform, ImageTransform):
        return max(64, _CHUNK_BYTES // (3 * transform.size_px**2))
    if isinstance(transform, AudioTransform):
        return max(16, int(_CHUNK_BYTES / (4 * transform.max_s * transform.sample_rate_hz)))
    return _TEXT_CHUNK


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """CUDA and Python have a class for it; the CPU's allocator and CUDA's libraries say so in words."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def _distinct(values: Sequence[object]) -> tuple[list[int], np.ndarray]:
    """Positions of the first of each distinct value, and for every value the index of its first among them."""
    index: dict[object, int] = {}
    by_object: dict[int, int] = {}
    firsts: list[int] = []
    inverse = np.empty(len(values), dtype=np.int64)
    for position, value in enumerate(values):
        at = by_object.get(id(value))
        if at is None:
            at = index.setdefault(_key(value), len(index))
            by_object[id(value)] = at
            if at == len(firsts):
                firsts.append(position)
        inverse[position] = at
    return firsts, inverse


def _key(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.shape, blake2b(np.ascontiguousarray(value).data, digest_size=16).digest()
    if isinstance(value, list | tuple):
        return tuple(_key(item) for item in value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def load(uri: str | Path, *, device: str = "auto", precision: Precision = "auto") -> Embedder:
    """The encoder of a local or s3:// folder; one in a bucket is copied to a local cache once per fingerprint.

    Raises EncoderError naming the folder and what to do.
    """
    folder = local_folder(str(uri))
    from conjoin.encoders.checkpoint import load as load_folder

    try:
        return Embedder(load_folder(folder), device=device, precision=precision)
    except ValueError as error:
        raise EncoderError(f"not a usable encoder: {error}", where=str(uri), next=_NO_FOLDER) from error


def read_spec(uri: str | Path) -> tuple[EncoderSpec, str]:
    """Spec and fingerprint of a local or s3:// encoder folder, without torch. Raises EncoderError."""
    from conjoin.encoders.checkpoint import read_spec as read_folder

    try:
        return read_folder(local_folder(str(uri)))
    except ValueError as error:
        raise EncoderError(f"not a usable encoder: {error}", where=str(uri), next=_NO_FOLDER) from error


def local_folder(uri: str) -> Path:
    """The folder itself, or the cached copy of one in a bucket. Raises EncoderError if there is no encoder."""
    spec = storage.join(uri, "spec.json")
    if not storage.exists(spec):
        raise EncoderError("no encoder there (no spec.json)", where=uri, next=_NO_FOLDER)
    if not storage.is_s3(uri):
        return Path(storage.filesystem(uri)[1])
    fingerprint = str(storage.read_json(spec).get("fingerprint", ""))
    if not fingerprint.isalnum():
        raise EncoderError("its spec.json has no fingerprint", where=uri, next=_NO_FOLDER)
    kept = _cache() / fingerprint
    if not (kept / "spec.json").exists():
        beside = kept.with_name(f".{fingerprint}.{os.getpid()}")
        storage.remove(str(beside))
        try:
            storage.copy_tree(uri, str(beside))
            beside.rename(kept)
        except StorageError as error:
            raise EncoderError(f"cannot copy the encoder: {error.what}", where=uri, next=error.next) from error
        except OSError:
            if not (kept / "spec.json").exists():  # another process was first
                raise
        finally:
            storage.remove(str(beside))
    return kept


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "conjoin" / "encoders"
