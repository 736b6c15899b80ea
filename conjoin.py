"""The Python face of conjoin: `import conjoin as cj`, every name loaded on first use.

Assumes: it lies beside the three floors. In the repository they are the top-level folders `encoders`,
`pipeline` and `jobs`; in an installed wheel this file is `conjoin/__init__.py` and they lie beside it there.
"""

from __future__ import annotations

import importlib
from pathlib import Path

__version__ = "0.1.0"
# One import name, wherever the floors lie: conjoin.pipeline is ours even in a project that has its own pipeline/.
__path__ = [str(Path(__file__).resolve().parent)]

_NAMES = {
    "open": ("conjoin.pipeline.query", "open_table"),
    "load": ("conjoin.pipeline.embedder", "load"),
    "config": ("conjoin.jobs.config", "load"),
    "train": ("conjoin.pipeline.train", "train"),
    "evaluate": ("conjoin.pipeline.evaluate", "evaluate"),
    "plan": ("conjoin.jobs.nightly", "plan"),
    "run": ("conjoin.jobs.nightly", "run"),
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module 'conjoin' has no attribute {name!r}")
    module, attribute = _NAMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
