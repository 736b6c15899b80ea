"""Paired Parquet, local or on S3, as records: files, row positions, a Ray Dataset, splits.

Assumes: the source is never modified.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conjoin.pipeline.section import Section


class Split(Section):
    """Shares of all groups; the rest is for training."""

    validation: float = Field(0.05, ge=0, lt=1)
    test: float = Field(0.05, ge=0, lt=1)


class SourceConfig(Section):
    """Where the catalog lies and which columns make a record."""

    path: str | list[str] = Field(description="a file, a glob, a directory, or a list; local or s3://")
    id: str = Field(description="the key column: unique, string or integer")
    group: str | None = Field(
        None, description="variants of one thing: never each other's negatives, never split apart"
    )
    changed_by: str | None = Field(
        None, description="a column that changes when the record does; default: content hashes"
    )
    image: str | None = Field(None, description="bytes, file path, s3://, http(s)://, or a list of them")
    text: str | None = Field(None, description='a column or a template over columns: "{title}. {brand}"')
    audio: str | None = Field(None, description="bytes or URI, like image")
    keep: list[str] = Field(default_factory=list, description="columns copied to the table")
    uri_change: Literal["immutable", "head", "content"] = Field(
        "immutable", description="when a URI's value counts as changed"
    )
    split: Split = Field(default_factory=Split, description="shares by a hash of the group or id")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities this source gives, in a fixed order."""
        return tuple(name for name in ("image", "text", "audio") if getattr(self, name) is not None)
