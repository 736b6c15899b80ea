"""What a run file means, found out without heavy work: no decoding, no encoder, no Ray.

Assumes: it changes nothing; a bucket is probed with an empty object that is removed again.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from conjoin.pipeline import storage
from conjoin.pipeline.errors import ConjoinError

if TYPE_CHECKING:
    from conjoin.jobs.config import RunFile


def understand(config: RunFile) -> dict[str, object]:
    """Facts by section: source, encoder, table, train, machine. Raises SourceError where the source does not fit."""
    return {
        "name": config.name,
        "source": _source(config),
        "encoder": _encoder(config),
        "table": _table(config),
        "train": _train(config),
        "machine": {"cores": len(os.sched_getaffinity(0)), "gpus wanted": config.cluster.gpus},
    }


def _source(config: RunFile) -> dict[str, object]:
    from conjoin.pipeline.source import list_source

    files = list_source(config.source)
    found: dict[str, object] = {
        "path": config.source.path,
        "files": len(files),
        "rows": sum(file.num_rows for file in files),
        "bytes": sum(file.size_bytes for file in files),
        "id": config.source.id,
        "group": config.source.group or f"{config.source.id} (no groups)",
    }
    found |= {modality: getattr(config.source, modality) for modality in config.source.modalities}
    found["keep"] = ", ".join(config.source.keep) or "nothing"
    return found


def _encoder(config: RunFile) -> dict[str, object]:
    if config.encoder is None:
        return {"path": "none yet", "next": "`conjoin train` makes one; then name its folder as `encoder:`"}
    from conjoin.pipeline.embedder import read_spec

    try:
        spec, fingerprint = read_spec(config.encoder)
    except ConjoinError as error:
        return {"path": config.encoder, "problem": str(error)}
    towers = {
        name: f"{tower.backbone}, {tower.pooling} pooling, {tower.width} -> {spec.dim}"
        for name, tower in spec.towers.items()
    }
    missing = [name for name in config.source.modalities if name not in spec.towers]
    found: dict[str, object] = {"path": config.encoder, "fingerprint": fingerprint, "dim": spec.dim, **towers}
    if missing:
        found["note"] = f"no tower for {', '.join(missing)}: the table will hold no vectors of it"
    return found


def _table(config: RunFile) -> dict[str, object]:
    uri = config.table.path
    found: dict[str, object] = {"path": uri, "writable": _writable(uri)}
    if not storage.exists(uri):
        return {**found, "state": "does not exist yet; `conjoin run` makes it"}
    from conjoin.pipeline.store import open_version

    try:
        live = open_version(uri, "live")
        return {**found, "live version": live.version, "rows": live.count_rows()}
    except ConjoinError as error:
        return {**found, "state": str(error)}


def _writable(uri: str) -> str:
    if not storage.is_s3(uri):
        folder = next((parent for parent in Path(uri).absolute().parents if parent.exists()), Path("/"))
        return "yes" if os.access(folder, os.W_OK) else f"no: {folder} is not writable"
    probe = f"{uri.removesuffix('.lance').rstrip('/')}.conjoin/.access-{uuid.uuid4().hex[:8]}"
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except ConjoinError as error:
        return f"no: {error}"
    return "yes"


def _train(config: RunFile) -> dict[str, object]:
    recipe = config.train
    towers = recipe.towers
    named = {
        name: f"{towers[name].model}, tune {towers[name].tune}" if name in towers else "builtin, tune all"
        for name in config.source.modalities
    }
    return {
        "rows where": recipe.where or "all of the training split",
        **named,
        "loss": recipe.loss,
        "batch": f"{recipe.global_batch_size} pairs over {recipe.workers} worker(s)",
        "epochs": recipe.epochs,
        "output": recipe.output,
    }
