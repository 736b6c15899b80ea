"""The command that a catalog's owner wants run after the tag moved: a cache to drop, a server to tell.

Assumes: it runs at least once per move (a night that dies between the move and its report runs it again); whatever it
does, the version stays live. What it prints goes nowhere but, its end, into the report.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from pydantic import Field

from conjoin.pipeline.section import Section

if TYPE_CHECKING:
    from conjoin.pipeline.publish import Entry

_SHOWN_CHARS = 1_000


class PublishConfig(Section):
    """What happens once a version is live."""

    hook: str | None = Field(
        None, description="a shell command, run with CONJOIN_RUN_ID, _VERSION, _PREVIOUS, _TABLE and _ACTION set"
    )
    hook_timeout_s: float = Field(600, gt=0, description="a hook that takes longer is killed")


@dataclass(frozen=True, slots=True)
class Hook:
    """exit_code: negative for a signal; output: the end of its stderr, or of its stdout where that is empty."""

    command: str
    exit_code: int
    seconds: float
    output: str = ""
    timed_out: bool = False

    @property
    def failed(self) -> bool:
        return self.exit_code != 0

    @property
    def problem(self) -> str:
        """One sentence about a hook that failed, empty if it did not."""
        if not self.failed:
            return ""
        how = f"was killed after {self.seconds:.0f} s" if self.timed_out else f"ended with exit code {self.exit_code}"
        said = f": {self.output}" if self.output else ""
        return f"publish.hook {how}, the version stays live ({self.command}){said}"


def run_hook(config: PublishConfig, uri: str, entry: Entry) -> Hook | None:
    """Run `publish.hook` about a move of `live`; None without a hook. Never raises for what the command does."""
    if config.hook is None:
        return None
    facts = {
        "RUN_ID": entry.run_id,
        "VERSION": str(entry.version),
        "PREVIOUS": "" if entry.before is None else str(entry.before),
        "TABLE": uri,
        "ACTION": entry.action,
    }
    environment = {**os.environ, **{f"CONJOIN_{name}": value for name, value in facts.items()}}
    started = time.monotonic()
    # Files, not pipes: a child that the command leaves behind would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            ["/bin/sh", "-c", config.hook],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        timed_out = _waited(process, config.hook_timeout_s)
        said = _end(err) or _end(out)
    return Hook(config.hook, process.returncode, round(time.monotonic() - started, 3), said, timed_out)


def _waited(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait for the end; whether it took too long, and was killed with all that it had started."""
    try:
        process.wait(timeout_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return True
    return False


def _end(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 4 * _SHOWN_CHARS))
    return file.read().decode(errors="replace").strip()[-_SHOWN_CHARS:]
