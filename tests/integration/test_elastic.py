"""A machine taken from a running training: with `min_workers` it goes on with those that are left, to the same weights.

The machines are Ray nodes of one cluster on this one; one is killed with the ranks that it runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.train import train

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys, threading, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from conjoin.pipeline import workers
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.train import train

source, recipe = SourceConfig.model_validate_json(sys.argv[1]), TrainConfig.model_validate_json(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]  # each has room for four ranks
cluster.wait_for_nodes()
workers.start(cluster.address)

def take_one() -> None:
    while not list(Path(recipe.output).glob("*/checkpoints/*5/state.json")):
        time.sleep(0.02)
    cluster.remove_node(nodes[1], allow_graceful=False)

threading.Thread(target=take_one, daemon=True).start()
report = train("shapes", source, recipe)
alive = sum(node["Alive"] for node in ray.nodes())
print(json.dumps({"folder": report.folder, "steps": report.steps, "alive": alive}))
"""


COLOURS, SHAPES = ("red", "green", "blue", "black", "orange", "purple"), ("circle", "square", "bar", "cross")


def test_a_training_that_loses_a_machine_ends_in_the_same_weights(
    draw_shape: Callable[..., bytes], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    rng = np.random.default_rng(0)
    pairs = [(COLOURS[i % 6], SHAPES[i // 6 % 4]) for i in range(240)]
    rows = {
        "id": [f"s{i}" for i in range(240)],
        "image": [draw_shape(*pair, rng) for pair in pairs],
        "caption": [f"a {colour} {shape}" for colour, shape in pairs],
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet", row_group_size=50)
    source = SourceConfig(path=str(tmp_path / "rows.parquet"), id="id", image="image", text="caption")
    settings = {
        "towers": {"image": {"size_px": 16}, "text": {"max_tokens": 12}},
        "dim": 16,
        "global_batch_size": 48,
        "workers": 2,
        "epochs": 12,
        "checkpoint_every_s": 0,
        "validate_every": 1,
    }
    elastically = {"output": str(tmp_path / "elastic"), "workers": 5, "min_workers": 1}
    recipe = TrainConfig.model_validate({**settings, **elastically})
    command = [sys.executable, "-c", SCRIPT, source.model_dump_json(), recipe.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    elastic = json.loads(done.stdout.splitlines()[-1])
    assert elastic["alive"] == 2, "the head and one of two machines"
    whole = train("shapes", source, TrainConfig.model_validate({**settings, "output": str(tmp_path / "whole")}))
    assert elastic["steps"] == whole.steps
    folders = [Path(elastic["folder"]), Path(whole.folder)]
    left, right = (load_file(folder / "last" / "model.safetensors") for folder in folders)
    for name, value in left.items():
        assert (value.float() - right[name].float()).abs().max() <= 1e-5, name
    lines = [json.loads(line) for line in (folders[0] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, whole.steps + 1))
