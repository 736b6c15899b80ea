"""ray_cluster.yaml is a file that Ray's launcher accepts."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_launcher_accepts_the_cluster_file() -> None:
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    workers = cluster["available_node_types"]
    assert sum(kind.get("max_workers", 0) for kind in workers.values()) <= cluster["max_workers"]
