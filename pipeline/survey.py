"""What there is tonight: the source's files, the encoder, the configuration; found without reading a row.

Assumes: a survey is a moment's view; what it finds is frozen by the plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conjoin.pipeline.errors import SourceError

if TYPE_CHECKING:
    from conjoin.encoders.spec import EncoderSpec
    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.source import SourceFile
    from conjoin.pipeline.state import Manifest


@dataclass(frozen=True, slots=True)
class Survey:
    """fingerprint: of the encoder; config: digest of what else decides the table's rows."""

    files: tuple[SourceFile, ...]
    spec: EncoderSpec
    fingerprint: str
    config: str


def survey(catalog: Catalog, known: Mapping[str, SourceFile] | None = None) -> Survey:
    """List the source and read the encoder's spec. known: files by path that need not be opened if unchanged.

    Raises SourceError, EncoderError or ConfigError where the two do not fit.
    """
    from conjoin.pipeline.embedder import read_spec
    from conjoin.pipeline.source import list_source

    spec, fingerprint = read_spec(catalog.encoder)
    if not modalities_of(catalog, spec):
        raise SourceError(
            f"the encoder embeds {', '.join(spec.towers)}, the source gives {', '.join(catalog.source.modalities)}",
            where=catalog.encoder,
            next="Name a column for one of the encoder's modalities",
        )
    return Survey(list_source(catalog.source, known), spec, fingerprint, config_digest(catalog))


def modalities_of(catalog: Catalog, spec: EncoderSpec) -> tuple[str, ...]:
    """What the source gives and the encoder embeds."""
    return tuple(name for name in catalog.source.modalities if name in spec.towers)


def config_digest(catalog: Catalog) -> str:
    """32 hex digits over the fields of the run file that decide the table's rows."""
    names = {"id", "image", "text", "audio", "changed_by", "keep", "uri_change"}
    source = catalog.source.model_dump(include=names)
    table = catalog.table.model_dump(include={"vector_dtype", "thumbnail_px"})
    return digest({**source, **table})


def digest(value: Mapping[str, object]) -> str:
    """32 hex digits over the JSON of a value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def is_current(manifest: Manifest | None, found: Survey, precision: str) -> bool:
    """Whether a version already holds just this: same files, encoder, precision and configuration."""
    if manifest is None:
        return False
    before = (manifest.fingerprint, manifest.precision, manifest.config)
    if before != (found.fingerprint, precision, found.config):
        return False
    return {entry.file for entry in manifest.files} == set(found.files)
