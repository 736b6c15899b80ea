"""What `train.path` names: parts of the training data, each a source with its own columns, weight and files.

Assumes: a part's `source.path` stays what the run file says, also where its files were made of it (pipeline/ingest.py),
so that relative URIs start there. Paths given as plain strings are one part, with the columns of `source`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from conjoin.pipeline.errors import ConfigError, SourceError
from conjoin.pipeline.listing import Kind, training_files
from conjoin.pipeline.members import KEY
from conjoin.pipeline.recipe import COLUMNS, TrainConfig, TrainPath
from conjoin.pipeline.source import SourceConfig, SourceFile, files_of, list_source
from conjoin.pipeline.storage import FileStat

if TYPE_CHECKING:
    from conjoin.pipeline.progress import ShowProgress


@dataclass(frozen=True, slots=True)
class Part:
    """files: Parquet, empty until `converted` where `inputs` are CSV or tars; entry: None for plain Parquet paths."""

    source: SourceConfig
    kind: Kind
    inputs: tuple[FileStat, ...]
    files: tuple[SourceFile, ...]
    entry: TrainPath | None = None

    @property
    def weight(self) -> float:
        return self.entry.weight if self.entry else 1.0

    @property
    def has_own_ids(self) -> bool:
        """Whether equal ids of this part and another are chance."""
        return self.kind == "tar" or (self.entry is not None and "id" in self.entry.named)


def parts(source: SourceConfig, recipe: TrainConfig) -> tuple[Part, ...]:
    """The parts in the order of the run file; Parquet files are opened, others only listed.

    Raises SourceError for files and columns that are not there, ConfigError for parts that nothing can be learned of.
    """
    found = (_source_part(source),) if recipe.path is None else _named_parts(source, recipe.path)
    _check_modalities(found, recipe)
    return found


def converted(parts: Sequence[Part], directory: str, progress: ShowProgress) -> tuple[Part, ...]:
    """The same with Parquet files everywhere; CSV and tars are converted below `directory`, once, on Ray.

    Raises SourceError for files that cannot be read, and for columns that are not in them.
    """
    wanted = [file for part in parts if part.kind != "Parquet" for file in part.inputs]
    if not wanted:
        return tuple(parts)
    from conjoin.pipeline.ingest import convert

    made = convert(wanted, directory, progress)
    return tuple(part if part.kind == "Parquet" else _opened(part, made) for part in parts)


def modalities(parts: Iterable[Part]) -> tuple[str, ...]:
    """Those that any part gives, in a fixed order."""
    there = {name for part in parts for name in part.source.modalities}
    return tuple(name for name in ("image", "text", "audio") if name in there)


def stamps(parts: Sequence[Part]) -> list[tuple[str, int, str]]:
    """Path, size and etag of every file that the training data comes from."""
    return [(file.uri, file.size_bytes, file.etag) for part in parts for file in part.inputs]


def _check_modalities(parts: Sequence[Part], recipe: TrainConfig) -> None:
    """Every part joins two modalities, and towers are of modalities that there are."""
    if unknown := sorted(set(recipe.towers) - set(modalities(parts))):
        raise ConfigError(
            f"train.towers names {unknown[0]!r}, which the source does not give", next="Name its column in source"
        )
    for part in parts:
        if len(part.source.modalities) < 2:
            given = ", ".join(part.source.modalities) or "none"
            what = f"training joins two modalities or more, the source gives {given}"
            raise ConfigError(what, where=part.entry.path if part.entry else "", next="Name a second column")


def _source_part(source: SourceConfig) -> Part:
    files = list_source(source)
    inputs = tuple(FileStat(file.path, file.size_bytes, file.etag) for file in files)
    return Part(source, "Parquet", inputs, files)


def _named_parts(source: SourceConfig, named: str | TrainPath | list[str | TrainPath]) -> tuple[Part, ...]:
    items = named if isinstance(named, list) else [named]
    if not items:
        raise SourceError("train.path is empty", next="Give a file, a glob, a directory, or a list of these")
    bare = source.model_copy(update={"keep": [], "changed_by": None})
    listed = [(item, *_listed(item if isinstance(item, str) else item.path)) for item in items]
    if all(isinstance(item, str) and kind == "Parquet" for item, kind, _ in listed):
        inputs = tuple(dict.fromkeys(file for _, _, files in listed for file in files))
        config = bare.model_copy(update={"path": named})
        return (Part(config, "Parquet", inputs, files_of(config, inputs)),)
    return tuple(
        _entry_part(bare, TrainPath(path=item) if isinstance(item, str) else item, kind, files)
        for item, kind, files in listed
    )


def _listed(path: str) -> tuple[Kind, list[FileStat]]:
    try:
        return training_files(path)
    except SourceError as error:
        raise _of_training(error) from None


def _entry_part(source: SourceConfig, entry: TrainPath, kind: Kind, files: Sequence[FileStat]) -> Part:
    """One entry: the source's columns but for those it names. Of a tar, id is the sample's key and nothing a group."""
    columns: dict[str, str | None] = {"id": KEY, "group": None} if kind == "tar" else {}
    config = source.model_copy(update={"path": entry.path, **columns, **entry.named})
    part = Part(config, kind, tuple(files), (), entry)
    return _opened(part, {file: file for file in files}) if kind == "Parquet" else part


def _opened(part: Part, made: Mapping[FileStat, FileStat]) -> Part:
    """With its files; made: the Parquet file of each input."""
    origin = {made[file].uri: file.uri for file in part.inputs}
    try:
        files = files_of(part.source, [made[file] for file in part.inputs])
    except SourceError as error:
        raise _of_training(error, part.entry, origin.get(error.where, error.where)) from None
    return replace(part, files=files)


def _of_training(error: SourceError, entry: TrainPath | None = None, where: str = "") -> SourceError:
    """The error in the words of `train.path`."""
    what, advice = error.what, error.next.replace("source.path", "train.path")
    if (field := what.removeprefix("source.").partition(":")[0]) in COLUMNS and entry is not None:
        if field in entry.named:
            what = f"train.path: {what.removeprefix('source.')}"
        elif field != "id":
            advice += f". Or say `{field}: null` in this entry of train.path if it has none"
    return SourceError(what.replace("source.path", "train.path"), where=where or error.where, next=advice)
