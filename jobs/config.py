"""The run file: one YAML file that says everything about a catalog, as frozen models.

Assumes: `${VAR}` and `${DATE}` are filled in here and nowhere below.
"""

from __future__ import annotations

import datetime as dt
import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from conjoin.pipeline.embed import EmbedConfig
from conjoin.pipeline.errors import ConfigError
from conjoin.pipeline.estimate import Limits
from conjoin.pipeline.gates import Gates
from conjoin.pipeline.hook import PublishConfig
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.section import Section
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.store import TableConfig
from conjoin.pipeline.upkeep import Upkeep

_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class ClusterConfig(Section):
    """The machines; without it everything runs on this one."""

    gpus: int = Field(0, ge=0, description="that a night works on, for its expected time and cost")
    address: str | None = Field(None, description="an existing Ray cluster; default: start Ray here")
    price_per_gpu_hour: float | None = Field(None, gt=0)


class NamedTable(Section):
    """A Parquet, CSV or Lance table that SQL can join; a bare path stands for `{path: ...}`."""

    path: str | list[str] = Field(min_length=1, description="a file, a glob, a directory, a list, or <name>.lance")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, given: object) -> object:
        return {"path": given} if isinstance(given, str | list) else given


class RunFile(Section):
    """The whole run file."""

    name: str = Field(pattern=_NAME, description="the table's name in SQL")
    source: SourceConfig
    encoder: str | None = Field(None, description="a trained encoder folder; nights and queries use it")
    table: TableConfig
    embed: EmbedConfig = EmbedConfig()
    limits: Limits = Limits()
    gates: Gates = Gates()
    upkeep: Upkeep = Field(default_factory=Upkeep, description="compaction, and how long things stay")
    publish: PublishConfig = PublishConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    tables: dict[Annotated[str, Field(pattern=_NAME)], NamedTable] = Field({}, description="that SQL can join, by name")

    @model_validator(mode="after")
    def _check_table_names(self) -> Self:
        lower = [name.lower() for name in (self.name, *self.tables)]
        if twice := next((name for name in self.tables if lower.count(name.lower()) > 1), None):
            raise ValueError(f"tables: the name {twice!r} is taken; SQL knows no capitals")
        return self

    @model_validator(mode="after")
    def _check_full_text(self) -> Self:
        """Before a night embeds everything and cannot index it."""
        known = [*self.source.keep, *(["text"] if self.source.text else [])]
        if unknown := next((name for name in self.table.full_text if name not in known), None):
            near = difflib.get_close_matches(unknown, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the table has {', '.join(known) or 'no texts'}"
            raise ValueError(f"table.full_text: there will be no column {unknown!r}; {hint}")
        return self


def load(file: str | Path = "conjoin.yaml", *, date: dt.date | None = None, **overrides: object) -> RunFile:
    """Read a run file; overrides are dotted fields with `__` for the dot (`train__epochs=3`).

    Raises ConfigError naming the file, the field and the nearest known key.
    """
    return read_run_file(Path(file), [(key.replace("__", "."), value) for key, value in overrides.items()], date)


_GIVE_A_FILE = "Give a run file (conjoin.yaml) or a table (<name>.lance)"


def read_run_file(file: Path, overrides: list[tuple[str, object]], date: dt.date | None) -> RunFile:
    """Overrides are (dotted field, value); strings are parsed as YAML."""
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError("no run file", where=str(file), next="`conjoin init DATA` writes one") from error
    except IsADirectoryError as error:
        raise ConfigError("a folder is no run file", where=str(file), next=_GIVE_A_FILE) from error
    except OSError as error:
        raise ConfigError(f"cannot read the run file: {error.strerror}", where=str(file)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        advice = "Inside { } a value with ${...} needs quotes" if "${" in said else ""
        raise ConfigError(f"not valid YAML: {said}", where=str(file), next=advice) from error
    if not isinstance(raw, dict):
        raise ConfigError("a run file is a mapping of sections", where=str(file))
    for field, value in overrides:
        _override(raw, field.split("."), _value(value) if isinstance(value, str) else value)
    filled = _fill(raw, {**os.environ, "DATE": (date or dt.date.today()).isoformat()}, str(file))  # noqa: DTZ011
    try:
        return RunFile.model_validate(filled)
    except ValidationError as error:
        raise ConfigError(_explain(error), where=str(file)) from None


def _value(text: str) -> object:
    """YAML, or the text itself where it is none: a template as "{title}. {brand}" needs no second quotes."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _override(raw: dict[str, Any], path: list[str], value: object) -> None:
    for key in path[:-1]:
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"--set {'.'.join(path)}: {key} is not a section")
    raw[path[-1]] = value


def _fill(value: Any, variables: dict[str, str], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item, variables, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, variables, where) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise ConfigError(f"${{{match[1]}}} is not set", where=where, next=f"export {match[1]}=...")
        return variables[match[1]]

    return _VARIABLE.sub(replace, value)


def _explain(error: ValidationError) -> str:
    """One line per wrong field: its dotted name, what is wrong, and for an unknown key the nearest known one."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"] if not str(part).startswith("<"))
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), _known(item["loc"][:-1]), 1, 0.5)
            lines.append(f"{name}: unknown key" + (f"; did you mean {near[0]!r}?" if near else ""))
        else:
            lines.append(f"{name}: {item['msg'][:1].lower()}{item['msg'][1:]}")
    return "; ".join(lines)


def _known(path: tuple[int | str, ...]) -> list[str]:
    model: Any = NamedTable if path[:1] == ("tables",) and len(path) > 1 else RunFile
    path = () if model is NamedTable else path
    for part in path:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            from conjoin.pipeline.recipe import TowerConfig, TrainPath

            return list((TrainPath if "<columns>" in path else TowerConfig).model_fields)
        model = field.annotation
    return list(getattr(model, "model_fields", {}))


def table_of(target: str) -> str:
    """URI of the table that a run file, or a table's own path, stands for. Raises ConfigError for neither."""
    if target.rstrip("/").endswith(".lance"):
        return target.rstrip("/")
    if "://" in target:
        raise ConfigError("not a table's path", where=target, next=_GIVE_A_FILE)
    return read_run_file(Path(target), [], None).table.path
