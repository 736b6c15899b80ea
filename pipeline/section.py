"""A section of the run file: a frozen model whose unknown keys are errors; each stage owns its own.

Assumes: modules that define sections import ray, torch, lance and transformers inside functions only, so that
reading a run file stays instant.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, strict about keys; `description` of every field is what `conjoin init` writes beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())
