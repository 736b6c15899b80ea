"""The living processes of a test's commands, Ray's included."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def living(key: str, name: str = "") -> list[int]:
    """Ids of processes whose environment has `key` in it and whose command line has `name` in it; no zombies."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and key.encode() in (folder / "environ").read_bytes():
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z" and name in (folder / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(folder.name))
    return found
