"""classify(): zero-shot labels, the nearest of some prompts, with their probability among these labels.

Assumes: vectors have unit length; the probability is the softmax of similarities times the encoder's own scale (CLIP,
Radford et al. 2021), and so says nothing of labels that were not given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from sqlglot import exp

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.analysis import Analysis
from conjoin.pipeline.query.functions import name_outputs
from conjoin.pipeline.query.pairs import unit_rows
from conjoin.pipeline.query.parse import function_name, shown
from conjoin.pipeline.query.relations import nearest_name
from conjoin.pipeline.query.scalar import Function, fresh_name
from conjoin.pipeline.store import VectorColumn

if TYPE_CHECKING:
    from conjoin.pipeline.embedder import Embedder

DEFAULT_TEMPLATE = "a {}"
MOST_LABELS = 10_000
_RESULT = "STRUCT(label VARCHAR, probability DOUBLE)"
_STRUCT = pa.struct([("label", pa.string()), ("probability", pa.float64())])


@dataclass(frozen=True, slots=True)
class Classifier:
    """One distinct classify() of a query. name: what DuckDB calls it."""

    name: str
    column: VectorColumn
    labels: tuple[str, ...]
    templates: tuple[str, ...]

    def stub(self) -> Function:
        """For binding a query without embedding anything."""
        return Function(self.name, (f"FLOAT[{self.column.dim}]",), _RESULT, _nothing)

    def function(self, encoder: Embedder) -> Function:
        """Embeds the prompts, once, and labels vectors from then on."""
        classes_CD, scale = embed_labels(encoder, self)
        labels = pa.array(self.labels, pa.string())

        def label(vectors: pa.ChunkedArray | pa.Array) -> pa.Array:
            return labelled(vectors, classes_CD, scale, labels)

        return Function(self.name, (f"FLOAT[{self.column.dim}]",), _RESULT, label)


def expand(analysis: Analysis, bound: dict[str, object]) -> tuple[Classifier, ...]:
    """Replace every classify(column, labels, templates) in the tree; takes lists given as parameters from `bound`.

    Raises QueryError for what is no vector column, no list of labels or no template.
    """
    nodes = [node for node in analysis.tree.find_all(exp.Anonymous) if function_name(node) == "classify"]
    name_outputs(nodes)
    known: dict[tuple[VectorColumn, tuple[str, ...], tuple[str, ...]], Classifier] = {}
    taken: set[str] = set()
    for node in nodes:
        where = shown(node)
        if not 2 <= len(node.expressions) <= 3:
            raise QueryError("classify() takes a vector column, a list of labels and prompt templates", where=where)
        taken |= {part.name for part in node.find_all(exp.Placeholder)}
        key = (_column(analysis, node.expressions[0].unnest(), where), *_prompts(node.expressions[1:], bound, where))
        made = known.setdefault(key, Classifier(fresh_name("classify"), *key))
        call = exp.Anonymous(this=made.name, expressions=[node.expressions[0].pop()])
        call.meta["per_row"] = True
        node.replace(call)
    left = {node.name for node in analysis.tree.find_all(exp.Placeholder)}
    for name in taken - left:
        bound.pop(name, None)
    return tuple(known.values())


def embed_labels(encoder: Embedder, wanted: Classifier) -> tuple[np.ndarray, float]:
    """(C, D) the mean direction of each label's prompts, and the encoder's scale. Raises QueryError."""
    column = wanted.column
    if "text" not in encoder.spec.towers:
        raise QueryError(f"the encoder of {column.name} has no text tower: it cannot classify", where=column.encoder)
    prompts = [template.replace("{}", label) for label in wanted.labels for template in wanted.templates]
    found = encoder.embed("text", prompts)
    if found.bad or not found.present.all():
        at = int(np.argmin(found.present))
        raise QueryError(f"classify(): the prompt {prompts[at]!r} cannot be embedded", where=column.encoder)
    means_CD = found.vectors.reshape(len(wanted.labels), len(wanted.templates), -1).mean(axis=1)
    norms_C1 = np.linalg.norm(means_CD, axis=1, keepdims=True)
    scale = float(encoder.encoder.scale(column.modality, "text").detach()) if column.modality != "text" else 1.0
    return means_CD / np.maximum(norms_C1, 1e-12), scale


def labelled(vectors: pa.ChunkedArray | pa.Array, classes_CD: np.ndarray, scale: float, labels: pa.Array) -> pa.Array:
    """Structs of label and probability; null where the vector is null, NaN or zero. Of equals the first label."""
    vectors_ND, usable_N, _ = unit_rows(vectors, classes_CD.shape[1])
    scores_NC = np.zeros((len(vectors_ND), len(classes_CD)), np.float64)
    scores_NC[usable_N] = scale * vectors_ND[usable_N] @ classes_CD.T
    best_N = scores_NC.argmax(axis=1)
    probabilities_N = 1 / np.exp(scores_NC - scores_NC.max(axis=1, keepdims=True)).sum(axis=1)
    columns = [labels.take(pa.array(best_N)), pa.array(probabilities_N)]
    return pa.StructArray.from_arrays(columns, fields=list(_STRUCT), mask=pa.array(~usable_N))


def _nothing(vectors: pa.ChunkedArray | pa.Array) -> pa.Array:
    return pa.nulls(len(vectors), _STRUCT)


def _column(analysis: Analysis, node: exp.Expr, where: str) -> VectorColumn:
    origin = analysis.origin(node) if isinstance(node, exp.Column) else None
    vector = origin[0].relation.vectors.get(origin[1]) if origin else None
    if vector is None:
        known = {name for ref in analysis.references.values() for name in ref.relation.vectors}
        near = nearest_name(node.name, known) if isinstance(node, exp.Column) else ""
        raise QueryError(f"classify(): {shown(node)} is not a vector column{near}", where=where)
    return vector


def _prompts(
    arguments: Sequence[exp.Expr], bound: Mapping[str, object], where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    labels = _texts(arguments[0].unnest(), bound)
    if labels is None or not 2 <= len(labels) <= MOST_LABELS or len(set(labels)) != len(labels):
        raise QueryError(
            f"classify() takes 2 to {MOST_LABELS:,} different labels", where=where, next="For example ['cat', 'dog']"
        )
    node = arguments[1].unnest() if len(arguments) > 1 else exp.Literal.string(DEFAULT_TEMPLATE)
    templates = _texts(node, bound)
    if not templates or any("{}" not in template for template in templates):
        advice = "For example 'a photo of a {}', or a list of such"
        raise QueryError("a template of classify() is a text with {} for the label", where=where, next=advice)
    return labels, templates


def _texts(node: exp.Expr, bound: Mapping[str, object]) -> tuple[str, ...] | None:
    """A text or a list of texts, literal or bound; None for anything else."""
    if isinstance(node, exp.Literal) and node.is_string:
        return (node.this,)
    if isinstance(node, exp.Placeholder):
        values = bound.get(node.name)
        return tuple(values) if isinstance(values, list) and all(isinstance(v, str) for v in values) else None
    items = node.expressions if isinstance(node, exp.Array) else []
    strings = [item.this for item in items if isinstance(item, exp.Literal) and item.is_string]
    return tuple(strings) if items and len(strings) == len(items) else None
