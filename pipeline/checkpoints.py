"""Training checkpoints: what is trained and the optimizer's state as safetensors, the rest as JSON; nothing pickled.

Assumes: a checkpoint is a folder written beside and renamed (on a bucket: its `state.json` is written last), so one
that can be seen is whole; the newest two are kept.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from conjoin.pipeline import storage
from conjoin.pipeline.errors import StorageError

if TYPE_CHECKING:
    import torch

    from conjoin.encoders.joint import JointEncoder
    from conjoin.encoders.spec import Json

_KEPT = 2
_STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Progressed:
    """step: global batches done; best_step and best_score: of the best validation so far, -1 before one;
    stopped: early, by patience or a callback.
    """

    step: int
    best_step: int = -1
    best_score: float = -1.0
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """tensors: trained parameters by name, `optimizer.<name>.<slot>` and `best.<name>`; log: a record per step."""

    progressed: Progressed
    tensors: Mapping[str, torch.Tensor]
    log: Sequence[Mapping[str, float]]


class Writer:
    """Writes checkpoints beside the training, one at a time; a context manager that ends when the last one is whole.

    Raises StorageError of a failed write at the next one, or at the end.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown()

    def write(self, checkpoint: Checkpoint) -> None:
        """Copies the tensors, which the next step changes, and returns; waits for the checkpoint before."""
        self._wait()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in checkpoint.tensors.items()}
        copied = replace(checkpoint, tensors=copies)
        self._writing = self._pool.submit(write, self._directory, copied)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()


def write(directory: str, checkpoint: Checkpoint) -> None:
    """Add a checkpoint and remove all but the newest two. Raises StorageError."""
    from safetensors.torch import save

    target = storage.join(directory, f"{checkpoint.progressed.step:010d}")
    body = save({name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()})
    storage.write_bytes(storage.join(target, "tensors.safetensors"), body)
    lines = "".join(f"{json.dumps(record)}\n" for record in checkpoint.log)
    storage.write_bytes(storage.join(target, "log.jsonl"), lines.encode())
    storage.write_json(storage.join(target, _STATE), asdict(checkpoint.progressed))
    for old in _steps(directory)[:-_KEPT]:
        storage.remove(storage.join(directory, f"{old:010d}", _STATE))
        storage.remove(storage.join(directory, f"{old:010d}"))


def newest(directory: str) -> Checkpoint | None:
    """The last whole checkpoint, None if there is none; a torn one is passed over."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    for step in reversed(_steps(directory)):
        folder = storage.join(directory, f"{step:010d}")
        try:
            raw = storage.read_json(storage.join(folder, _STATE))
            tensors = load(storage.read_bytes(storage.join(folder, "tensors.safetensors")))
            lines = storage.read_bytes(storage.join(folder, "log.jsonl")).decode().splitlines()
        except (StorageError, SafetensorError):
            continue
        raw.pop("format")
        log = [json.loads(line) for line in lines]
        return Checkpoint(Progressed(**raw), tensors, log)  # type: ignore[arg-type]  # our own JSON
    return None


def _steps(directory: str) -> list[int]:
    states = [uri for uri in storage.list_files(directory) if uri.endswith(f"/{_STATE}")]
    return sorted(int(uri.split("/")[-2]) for uri in states)


def save_encoder(encoder: JointEncoder, uri: str, metadata: Mapping[str, Json]) -> str:
    """The encoder's folder, local or on a bucket (there its spec.json comes last); returns the fingerprint."""
    from conjoin.encoders.checkpoint import save

    if not storage.is_s3(uri):
        return save(encoder, Path(uri), metadata)
    with tempfile.TemporaryDirectory(prefix="conjoin-encoder-") as scratch:
        folder = Path(scratch) / "encoder"
        fingerprint = save(encoder, folder, metadata)
        for file in sorted(folder.iterdir(), key=lambda path: path.name == "spec.json"):
            storage.write_bytes(storage.join(uri, file.name), file.read_bytes())
    return fingerprint
