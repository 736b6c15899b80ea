"""What the README says about commands and files is what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from conjoin.jobs.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def shell_lines() -> list[str]:
    """Every `conjoin ...` line of the README's shell blocks."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip().startswith("conjoin ")]


@pytest.mark.parametrize("line", shell_lines())
def test_readme_commands_exist_with_their_options(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[1] in COMMANDS, f"README names `conjoin {words[1]}`"
    known = {option for parameter in COMMANDS[words[1]].params for option in parameter.opts}
    used = {word.partition("=")[0] for word in words[2:] if word.startswith("-")}
    assert used <= known, f"{words[1]} has no {used - known}"


def test_every_command_is_in_the_readme() -> None:
    assert not [name for name in COMMANDS if f"conjoin {name}" not in README]


def test_help_of_every_command_says_what_it_does() -> None:
    for name, command in COMMANDS.items():
        assert command.help, f"conjoin {name} has no help"
        for parameter in command.params:
            if parameter.name not in ("help",):
                assert parameter.help, f"conjoin {name} {parameter.name} has no help"


@pytest.mark.parametrize("target", re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_file_map_is_the_tree() -> None:
    mapped = set(re.findall(r"^    ((?:encoders|pipeline|jobs)/[\w/]+\.py)", README, re.MULTILINE))
    there = {
        str(path.relative_to(ROOT))
        for floor in ("encoders", "pipeline", "jobs")
        for path in (ROOT / floor).rglob("*.py")
        if path.name != "__init__.py" or path.parent.name not in ("encoders", "pipeline", "jobs")
    }
    assert mapped == there, f"not in the map: {sorted(there - mapped)}; not in the tree: {sorted(mapped - there)}"
