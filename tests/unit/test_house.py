"""The house: floors import downward, files stay small, documents and code agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOOR = {"encoders": 0, "pipeline": 1, "jobs": 2}
FORBIDDEN_IN_ENCODERS = {"ray", "lance", "lancedb", "duckdb", "fsspec", "s3fs", "pydantic"}
FILES = [*sorted(path for floor in FLOOR for path in (ROOT / floor).rglob("*.py")), ROOT / "conjoin.py"]

# Modules of commands: the parameters of a function are the options of a command.
COMMANDS = {"cli.py", "queries.py", "operations.py"}


def imports(path: Path) -> set[str]:
    """Every absolute module name that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(module: str) -> int | None:
    parts = module.split(".")
    return FLOOR.get(parts[1]) if parts[0] == "conjoin" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES[:-1], ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for module in imports(path):
        above = floor_of(module)
        assert above is None or above <= FLOOR[own], f"{path} imports {module}, a floor above"
        assert module.split(".")[0] not in FLOOR, f"{path} imports {module}: say conjoin.{module}"
        if own == "encoders":
            assert module.split(".")[0] not in FORBIDDEN_IN_ENCODERS, f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500, f"{path} has more than 500 lines"
    assert text.isascii(), f"{path} is not ASCII"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} has no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
            body = node.body[1:] if has_docstring else node.body
            if body:
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1
                assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"
            arguments = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
            limit = 14 if path.name in COMMANDS else 6
            assert len(arguments) <= limit, f"{path}:{node.lineno} {node.name} takes {len(arguments)} parameters"


def test_no_module_without_a_noun() -> None:
    banned = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
    assert not [path for path in FILES if path.stem in banned or re.search(r"_v\d$", path.stem)]


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "ray", "lance", "lancedb", "transformers", "duckdb", "pyarrow", "pandas"}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import conjoin", set()),
        ("import conjoin.encoders.spec", set()),
        ("import conjoin.jobs.config", set()),
        ("import conjoin.jobs.cli", set()),
    ],
    ids=["face", "spec", "run-file", "command-line"],
)
def test_import_is_light(code: str, allowed: set[str]) -> None:
    assert loaded_after(code) & HEAVY <= allowed
