"""conjoin started inside a project that has its own pipeline/ and jobs/ must import its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import pipeline, jobs                      # the project's own
import ray
import conjoin as cj
from conjoin.pipeline import workers

@ray.remote
def where():
    import pipeline
    import conjoin.pipeline.source as ours
    return pipeline.OWNER, ours.SourceConfig(path="x", id="id").id

workers.start()
print(pipeline.OWNER, jobs.OWNER, cj.config("conjoin.yaml").name, *ray.get(where.remote()))
"""


def project(root: Path) -> Path:
    for name in ("pipeline", "jobs", "encoders"):
        (root / name).mkdir()
        (root / name / "__init__.py").write_text("OWNER = 'project'\n")
        for module in ("source", "config", "cli", "spec"):
            (root / name / f"{module}.py").write_text("raise ImportError('the project was taken for conjoin')\n")
    (root / "conjoin.yaml").write_text(
        "name: shop\nsource: {path: none.parquet, id: id}\ntable: {path: v/shop.lance}\n"
    )
    (root / "main.py").write_text(SCRIPT)
    return root


def test_inside_another_project_locally_and_on_ray_workers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=project(tmp_path), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split()[-5:] == ["project", "project", "shop", "project", "id"], done.stderr[-2000:]


def test_the_command_inside_another_project(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "conjoin"), "check"]
    done = subprocess.run(command, cwd=project(tmp_path), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "none.parquet" in done.stderr
