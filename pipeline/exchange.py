"""Encoders in from other libraries and out to them, as folders on a disk or in a bucket, with a model card.

Assumes: an encoder's folder that training wrote is `<run folder>/best`, with train.json and report.json beside it; they
are believed only while the report names the encoder's own fingerprint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from conjoin.pipeline import storage
from conjoin.pipeline.card import Facts, Form, card
from conjoin.pipeline.errors import ConfigError, EncoderError, StorageError

if TYPE_CHECKING:
    from conjoin.encoders.joint import JointEncoder

_NO_PLACE = "Give a folder that does not exist yet"


def import_encoder(source: str, directory: str) -> str:
    """Write another library's checkpoint as an encoder's folder; returns its fingerprint.

    source: a directory, local or in a bucket, `package:NAME` or a hub name. Raises EncoderError saying what cannot be
    had and why, ConfigError where `directory` holds something already.
    """
    from conjoin.encoders.imported import import_encoder as read
    from conjoin.pipeline.checkpoints import save_encoder

    _check_free(directory)
    with tempfile.TemporaryDirectory(prefix="conjoin-import-") as scratch:
        place = source
        if storage.is_s3(source):
            place = scratch
            storage.copy_tree(source, scratch)
        try:
            encoder = read(place)
        except (ValueError, OSError) as error:
            raise EncoderError(f"cannot be imported: {error}") from error
    return save_encoder(encoder, directory, {"imported_from": source})


def export_encoder(uri: str, directory: str, form: Form | None = None) -> str:
    """Write an encoder for another library, with a model card; returns the name of the class that loads it.

    form: by default what holds all towers: `transformers`, or `sentence-transformers` for text alone.
    Raises EncoderError where the towers cannot be said in that library's terms, ConfigError for a table or where
    `directory` holds something already.
    """
    from conjoin.encoders.exported import export_text_tower, export_transformers
    from conjoin.pipeline.embedder import load

    if uri.rstrip("/").endswith(".lance"):
        advice = "Read a table's rows with `conjoin query TABLE SQL -o rows.parquet`"
        raise ConfigError("export takes an encoder's folder, this is a table", where=uri, next=advice)
    _check_free(directory)
    found = load(uri, device="cpu")
    alone = set(found.spec.towers) == {"text"}
    with tempfile.TemporaryDirectory(prefix="conjoin-export-") as scratch:
        folder = Path(scratch) / "model"
        try:
            if (form or ("sentence-transformers" if alone else "transformers")) == "transformers":
                loads_as = export_transformers(found.encoder, folder)
            else:
                export_text_tower(found.encoder, folder)
                loads_as = "SentenceTransformer"
        except ValueError as error:
            raise EncoderError(f"cannot be exported: {error}", where=uri) from error
        text = card(_facts(uri, found.encoder, found.fingerprint, loads_as))
        (folder / "README.md").write_text(text, encoding="utf-8")
        storage.copy_tree(str(folder), directory)
    return loads_as


def _check_free(directory: str) -> None:
    if storage.list_files(directory):
        raise ConfigError("there is something in the folder already", where=directory, next=_NO_PLACE)


def _facts(uri: str, encoder: JointEncoder, fingerprint: str, loads_as: str) -> Facts:
    metadata = storage.read_json(storage.join(uri, "spec.json")).get("metadata")
    origin = str(metadata.get("imported_from", "")) if isinstance(metadata, dict) else ""
    run = storage.absolute(uri).rstrip("/").rpartition("/")[0]
    train, report = (_beside(run, name) for name in ("train.json", "report.json"))
    if report.get("fingerprint") != fingerprint:
        train, report = {}, {}
    name = (run if report else uri).rstrip("/").rpartition("/")[2]
    bias = float(next(iter(encoder.biases.values()))) if encoder.biases and loads_as != "SiglipModel" else None
    return Facts(name, fingerprint, encoder.spec, loads_as, origin, bias, train, report)


def _beside(run: str, name: str) -> Mapping[str, object]:
    """Of a training run's folder; empty where the encoder does not lie in one."""
    try:
        return storage.read_json(storage.join(run, name))
    except StorageError:
        return {}
