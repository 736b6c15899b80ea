"""Ray, started here or joined on a cluster, with worker processes set up for tensor work.

Assumes: nothing imports this where no Ray is wanted (queries, a night with nothing to do).
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from conjoin.pipeline.errors import ConjoinError

# Page faults of freed and re-mapped tensors eat up to half of the CPU time of convolution batches; glibc reads
# these before Python starts, so they can only be given to worker processes.
MALLOC_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "256000000",
}
_PASSED_ON = ("AWS_", "HF_", "CONJOIN_")
_OBJECT_STORE_BYTES = 2 << 30
_started = ""  # address of the Ray that this process started


def start(address: str | None = None) -> None:
    """Join `address`, or start Ray on this machine; does nothing if it already runs in this process."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    global _started
    if ray.is_initialized():
        return
    passed = {key: value for key, value in os.environ.items() if key.startswith(_PASSED_ON)}
    options = {} if address else {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    before = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        # Ray's children are forked only to become other programs at once.
        warnings.filterwarnings("ignore", "lance is not fork-safe", UserWarning)
        ray.init(
            address=address or "local",
            runtime_env={"env_vars": {**MALLOC_ENV, **passed}},
            log_to_driver=bool(os.environ.get("CONJOIN_RAY_LOGS")),
            logging_level="ERROR",
            **options,
        )
    _started = "" if address else ray.get_runtime_context().gcs_address
    # Ray's handler exits without a word; one that its caller has set knows what to say.
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def data_settings() -> Iterator[None]:
    """Ray Data without bars and chatter, with errors as they were raised, and with patience for long units."""
    import logging

    import ray.data

    # Ray Data lets go of actors and their CPUs when its executor is collected, and an error's frames put that off:
    # what an earlier stage of this process left behind would keep this one waiting for ever.
    gc.collect()
    context = ray.data.DataContext.get_current()
    wanted = {
        "enable_progress_bars": False,
        "raise_original_map_exception": True,
        "execution_no_progress_timeout_s": -1,
    }
    before = {name: getattr(context, name) for name in wanted}
    consoles = [h for h in logging.getLogger("ray.data").handlers if type(h).__name__ == "PlainRayHandler"]
    levels = [handler.level for handler in consoles]
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        for handler in consoles:
            handler.setLevel(logging.CRITICAL)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)


def started_here() -> bool:
    """Whether Ray is this process's own: on this machine, without a dashboard, gone when the process is."""
    import ray

    return bool(_started) and ray.is_initialized() and ray.get_runtime_context().gcs_address == _started


def num_cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def num_gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def failure(error: Exception, what: str, *, where: str = "", next: str = "") -> Exception:  # noqa: A002
    """Our own error inside Ray's, else what a task raised; `what` and Ray's first line if its process died."""
    from ray.exceptions import RayTaskError

    inner: object = error
    while isinstance(inner, RayTaskError) and isinstance(inner.cause, Exception):
        if isinstance(inner.cause, ConjoinError):
            inner.cause.add_note(str(error))
            return inner.cause
        inner = inner.cause
    if isinstance(error, RayTaskError):
        return error
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return ConjoinError(f"{what}: {first_line}", where=where, next=next)
