"""The Python face of conjoin: `import conjoin as cj`, every name loaded on first use.

Assumes: the three floors are the folders `encoders`, `pipeline` and `jobs` beside this file in the repository, and
below a folder `conjoin` beside it where it is installed.
"""

from __future__ import annotations

import importlib
from pathlib import Path

__version__ = "0.1.0"
# One import name, wherever the floors lie: conjoin.pipeline is ours even in a project that has its own pipeline/.
_here = Path(__file__).resolve().parent
__path__ = [str(_here / "conjoin" if (_here / "conjoin").is_dir() else _here)]

_NAMES = {
    "open": ("conjoin.jobs.target", "open_target"),
    "interop": ("conjoin.pipeline.interop", ""),
    "load": ("conjoin.pipeline.embedder", "load"),
    "import_encoder": ("conjoin.pipeline.exchange", "import_encoder"),
    "export_encoder": ("conjoin.pipeline.exchange", "export_encoder"),
    "config": ("conjoin.jobs.config", "load"),
    "train": ("conjoin.jobs.tasks", "train"),
    "evaluate": ("conjoin.jobs.tasks", "evaluate"),
    "plan": ("conjoin.jobs.nightly", "plan"),
    "calibrate": ("conjoin.jobs.tasks", "calibrate"),
    "run": ("conjoin.jobs.nightly", "run"),
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module 'conjoin' has no attribute {name!r}")
    module, attribute = _NAMES[name]
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return sorted(__all__)
