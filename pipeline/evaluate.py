"""Evaluation sets to metrics: retrieval between every pair of modalities, both ways, and zero-shot classification.

Assumes: a candidate is right if it bears the query's group; without a group column, if it bears the same text; equal
contents of the query's modality are one query, so that a caption that five pictures share is asked once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from conjoin.encoders.spec import Json
from conjoin.pipeline import calibration, metrics
from conjoin.pipeline.calibration import Curve
from conjoin.pipeline.errors import ConfigError, SourceError, TableError
from conjoin.pipeline.metrics import Chance, Estimate
from conjoin.pipeline.progress import ShowProgress, silent
from conjoin.pipeline.ranking import Side, ranked

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.embedder import Embedder
    from conjoin.pipeline.store import VectorColumn

KS = (1, 5, 10)
MAX_QUERIES = 20_000
_CLASSIFIED = ("image", "audio", "text")
_MAX_CLASSES = 10_000


@dataclass(frozen=True, slots=True)
class Vectors:
    """One modality of an evaluation set, its missing values left out.

    vectors_ND: unit, float32; groups_N and contents_N: codes that are equal where the group or the content is.
    """

    vectors_ND: NDArray[np.float32]
    groups_N: NDArray[np.int64]
    contents_N: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Direction:
    """Retrieval of `candidate` by `query`; hit_at by k.

    num_queries: those that were asked, of num_distinct that the set has; fewer where they were drawn at random.
    chance_at: hit_at of an encoder that knows nothing.
    """

    query: str
    candidate: str
    num_queries: int
    num_distinct: int
    num_candidates: int
    hit_at: Mapping[int, Estimate]
    chance_at: Mapping[int, float]
    median_rank: Estimate
    mrr: Estimate


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """Accuracy of the nearest prompt, `templates` filled with each class of a column and averaged."""

    column: str
    modality: str
    num_classes: int
    num_rows: int
    templates: tuple[str, ...]
    accuracy: Estimate
    chance: Chance


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything measured on one set; `name` says which rows; calibration: by pair of modalities, where asked for."""

    name: str
    directions: tuple[Direction, ...]
    zero_shot: ZeroShot | None = None
    calibration: Mapping[str, Curve] = field(default_factory=dict)

    def direction(self, query: str, candidate: str) -> Direction:
        """Raises KeyError if it was not measured."""
        for found in self.directions:
            if (found.query, found.candidate) == (query, candidate):
                return found
        raise KeyError(f"{query} -> {candidate}")

    def to_json(self) -> dict[str, Json]:
        return cast(dict[str, Json], asdict(self))


@dataclass(frozen=True, slots=True)
class Classes:
    """What to classify: a column's values as classes, by prompts such as `a photo of {}`."""

    column: str
    templates: tuple[str, ...] = ("a {}",)

    def __post_init__(self) -> None:
        for template in self.templates:
            if "{}" not in template:
                raise ConfigError(
                    f"the prompt template {template!r} has no {{}} for the class", next="For example 'a photo of {}'"
                )


@dataclass(frozen=True, slots=True)
class Measure:
    """How to measure. queries: at most so many in each direction, drawn at random with a fixed seed; 0: all.

    classes: zero-shot classification too. address: of the Ray cluster that works; default: this machine.
    calibrate: fit relevance() on these rows and leave it beside the encoder.
    """

    queries: int = MAX_QUERIES
    classes: Classes | None = None
    address: str | None = None
    calibrate: bool = False

    def __post_init__(self) -> None:
        if self.queries < 0:
            raise ConfigError(f"{self.queries} queries cannot be asked", next="Name a number, or 0 for all")


def compare(
    sets: Mapping[str, Vectors],
    measure: Measure = Measure(),
    progress: ShowProgress = silent,
) -> tuple[Direction, ...]:
    """Both directions of every pair of modalities that have vectors; queries without a right candidate are left out."""
    return tuple(
        _direction((query, candidate), sets, measure, progress)
        for query, candidate in permutations(sets, 2)
        if np.isin(sets[query].groups_N, sets[candidate].groups_N).any()
    )


def _direction(
    pair: tuple[str, str], sets: Mapping[str, Vectors], measure: Measure, progress: ShowProgress
) -> Direction:
    queries, candidates = sets[pair[0]], sets[pair[1]]
    _, first = np.unique(queries.contents_N, return_index=True)
    distinct = np.sort(first)[np.isin(queries.groups_N[np.sort(first)], candidates.groups_N)]
    asked = distinct
    if 0 < measure.queries < len(distinct):
        asked = np.sort(np.random.default_rng(0).choice(distinct, measure.queries, replace=False))
    found = ranked(
        Side(queries.vectors_ND[asked], queries.groups_N[asked]),
        Side(candidates.vectors_ND, candidates.groups_N),
        address=measure.address,
        progress=progress,
    )
    return Direction(
        query=pair[0],
        candidate=pair[1],
        num_queries=len(found),
        num_distinct=len(distinct),
        num_candidates=len(candidates.vectors_ND),
        hit_at={k: metrics.bootstrap(metrics.hit_at(found, k)) for k in KS},
        chance_at=_chance_at(queries.groups_N[asked], candidates.groups_N),
        median_rank=metrics.bootstrap(metrics.rank(found), np.median),
        mrr=metrics.bootstrap(metrics.reciprocal_rank(found)),
    )


def _chance_at(query_groups_Q: NDArray[np.int64], groups_N: NDArray[np.int64]) -> dict[int, float]:
    """What equal scores for all candidates would earn."""
    known, counts = np.unique(groups_N, return_counts=True)
    right_Q = counts[np.searchsorted(known, query_groups_Q)]
    tied = metrics.Places(np.zeros_like(right_Q), np.full_like(right_Q, len(groups_N)), right_Q)
    return {k: float(metrics.hit_at(tied, k).mean()) for k in KS}


def classify(
    modality: str, vectors_ND: NDArray[np.float32], labels: Sequence[str], embedder: Embedder, classes: Classes
) -> ZeroShot:
    """Zero-shot accuracy of rows whose label is known. Raises ConfigError for too many classes."""
    names = sorted(set(labels))
    if not 2 <= len(names) <= _MAX_CLASSES:
        raise ConfigError(
            f"column {classes.column!r} has {len(names)} classes", next=f"Name one with 2 to {_MAX_CLASSES}"
        )
    prompts = [template.replace("{}", name) for name in names for template in classes.templates]
    embedded = embedder.embed("text", prompts).vectors.reshape(len(names), len(classes.templates), -1)
    classes_CD = embedded.mean(1)
    classes_CD /= np.linalg.norm(classes_CD, axis=1, keepdims=True)
    codes = {name: code for code, name in enumerate(names)}
    labels_N = np.array([codes[label] for label in labels])
    right_N = metrics.nearest_class(vectors_ND, classes_CD) == labels_N
    accuracy = metrics.bootstrap(right_N.astype(float))
    return ZeroShot(
        classes.column,
        modality,
        len(names),
        len(labels),
        classes.templates,
        accuracy,
        metrics.chance(labels_N, len(names)),
    )


def evaluate_table(
    uri: str,
    where: str | None = None,
    *,
    group: str | None = None,
    measure: Measure = Measure(),
    version: str | int = "live",
    progress: ShowProgress = silent,
) -> Evaluation:
    """The stored vectors of a table's rows; `group` counts where the table keeps that column. Starts Ray if large.

    Raises TableError for an unknown column, a bad condition or no rows.
    """
    from conjoin.pipeline.store import open_version, vector_columns

    classes, dataset = measure.classes, open_version(uri, version)
    columns = vector_columns(dataset)
    names = set(dataset.schema.names)
    if classes and classes.column not in names:
        raise TableError(f"no column {classes.column!r}", where=uri, next="Add it to source.keep and run again")
    kept = [name for name in (group, classes.column if classes else None) if name and name in names]
    wanted = [*columns, *(f"{column.modality}_hash" for column in columns.values()), *kept]
    rows = _scan(dataset, list(dict.fromkeys(wanted)), where, uri)
    groups = _groups(rows, group if group in names else None)
    sets = {column.modality: _vectors(rows, column.modality, groups) for column in columns.values()}
    zero_shot = _classify_rows(rows, _loader(columns), classes, classes.column) if classes else None
    curves = _calibrate(next(iter(columns.values())), sets, where) if measure.calibrate else {}
    return Evaluation(where or "all rows", compare(sets, measure, progress), zero_shot, curves)


def _loader(columns: Mapping[str, VectorColumn]) -> Embedder:
    """The encoder that filled the columns. Raises TableError if its folder holds another one now."""
    from conjoin.pipeline.embedder import load

    column = next(iter(columns.values()))
    embedder = load(column.encoder)
    if embedder.fingerprint != column.fingerprint:
        raise TableError("the encoder's folder holds another encoder than the table's", where=column.encoder)
    return embedder


def _classify_rows(rows: pa.Table, embedder: Embedder, classes: Classes, label: str) -> ZeroShot:
    """Rows with a label and a vector, classified by the first of image, audio, text that they have."""
    modality = next(name for name in _CLASSIFIED if f"{name}_vec" in rows.column_names)
    known = rows.filter(_valid(label)).filter(_valid(f"{modality}_vec"))
    labels = [str(value) for value in known[label].to_pylist()]
    return classify(modality, _matrix(known[f"{modality}_vec"]), labels, embedder, classes)


def _valid(name: str) -> object:
    import pyarrow.compute as pc

    return pc.field(name).is_valid()


def _scan(dataset: lance.LanceDataset, columns: list[str], where: str | None, uri: str) -> pa.Table:
    try:
        rows = dataset.to_table(columns=columns, filter=where)
    except (OSError, ValueError) as error:
        raise TableError(f"cannot read the rows where {where}: {str(error).splitlines()[0]}", where=uri) from error
    if not rows.num_rows:
        raise TableError(f"no rows where {where}", where=uri)
    return rows


def _groups(rows: pa.Table, group: str | None) -> NDArray[np.int64]:
    """Codes: the group column's; else the text's; else every row is its own."""
    name = group or ("text_hash" if "text_hash" in rows.column_names else None)
    return np.arange(rows.num_rows) if name is None else _codes(rows[name])


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Equal values get equal codes; each null gets one of its own."""
    import pyarrow.compute as pc

    encoded = pc.dictionary_encode(column).combine_chunks()
    codes = np.asarray(pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False), dtype=np.int64)
    missing = codes < 0
    codes[missing] = len(encoded.dictionary) + np.arange(missing.sum())
    return codes


def _vectors(rows: pa.Table, modality: str, groups: NDArray[np.int64]) -> Vectors:
    import pyarrow.compute as pc

    there = np.asarray(pc.is_valid(rows[f"{modality}_vec"]))
    contents = _codes(rows[f"{modality}_hash"])
    matrix = _matrix(rows[f"{modality}_vec"].filter(pc.is_valid(rows[f"{modality}_vec"])))
    return Vectors(matrix, groups[there], contents[there])


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A fixed-size list column without nulls as (N, D) float32."""
    size = column.type.list_size
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.reshape(-1, size), dtype=np.float32)


def evaluate_split(
    catalog: Catalog,
    split: str,
    *,
    measure: Measure = Measure(),
    progress: ShowProgress = silent,
) -> Evaluation:
    """The rows of the source's validation or test split, embedded now, on Ray.

    Raises SourceError when the split has no rows, EncoderError when the encoder cannot be loaded.
    """
    from conjoin.pipeline.embedder import load
    from conjoin.pipeline.held_out import HeldOut, embedded

    classes, source = measure.classes, catalog.source
    wanted = HeldOut(catalog, split, classes.column if classes else None)
    rows = embedded(wanted, address=measure.address, progress=progress)
    if rows is None:
        raise SourceError(
            f"the {split} split has no rows", where=str(source.path), next="Raise source.split in the run file"
        )
    modalities = [name for name in source.modalities if f"{name}_vec" in rows.column_names]
    sets = {name: _vectors(rows, name, _codes(rows["group"])) for name in modalities}
    zero_shot = _classify_rows(rows, load(catalog.encoder), classes, "label") if classes else None
    curves = (
        calibration.keep(catalog.encoder, _sides(sets), f"{split} split of {source.path}") if measure.calibrate else {}
    )
    return Evaluation(f"{split} split", compare(sets, measure, progress), zero_shot, curves)


def _calibrate(column: VectorColumn, sets: Mapping[str, Vectors], where: str | None) -> dict[str, Curve]:
    """Of a table's rows, which somebody says were held out. Raises TableError if the folder holds another encoder."""
    from conjoin.pipeline.embedder import read_spec

    if read_spec(column.encoder)[1] != column.fingerprint:
        raise TableError("the encoder's folder holds another encoder than the table's", where=column.encoder)
    return calibration.keep(column.encoder, _sides(sets), f"the table's rows where {where or 'true'}")


def _sides(sets: Mapping[str, Vectors]) -> dict[str, Side]:
    return {name: Side(found.vectors_ND, found.groups_N) for name, found in sets.items()}
