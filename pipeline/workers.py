"""Ray, started here or joined on a cluster, with worker processes set up for tensor work.

Assumes: nothing imports this where no Ray is wanted (queries, a night with nothing to do).
"""

from __future__ import annotations

import os

# Page faults of freed and re-mapped tensors eat up to half of the CPU time of convolution batches; glibc reads
# these before Python starts, so they can only be given to worker processes.
MALLOC_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "256000000",
}
_PASSED_ON = ("AWS_", "HF_", "CONJOIN_")
_OBJECT_STORE_BYTES = 2 << 30


def start(address: str | None = None) -> None:
    """Join `address`, or start Ray on this machine; does nothing if it already runs in this process."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    passed = {key: value for key, value in os.environ.items() if key.startswith(_PASSED_ON)}
    options = {} if address else {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    ray.init(
        address=address or "local",
        runtime_env={"env_vars": {**MALLOC_ENV, **passed}},
        log_to_driver=bool(os.environ.get("CONJOIN_RAY_LOGS")),
        logging_level="ERROR",
        **options,
    )


def num_cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def num_gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))
