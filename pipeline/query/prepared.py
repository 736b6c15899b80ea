"""A checked query: what DuckDB will run, what is read for it, and which vectors and functions it needs.

Assumes: nothing of a table is read yet but its schema; DuckDB has bound the query against empty tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sqlglot import exp

from conjoin.pipeline.query import classification, relevance, text_search
from conjoin.pipeline.query.analysis import analyse
from conjoin.pipeline.query.classification import Classifier
from conjoin.pipeline.query.crossing import check_crossings
from conjoin.pipeline.query.execute import Engine
from conjoin.pipeline.query.functions import Rewritten, rewrite
from conjoin.pipeline.query.neighbours import Near, with_neighbours
from conjoin.pipeline.query.parameters import Params, bind, by_name, words_of
from conjoin.pipeline.query.parse import DIALECT
from conjoin.pipeline.query.planner import Read, plan_reads
from conjoin.pipeline.query.questions import Question, outcome
from conjoin.pipeline.query.ranked import Ranked, ranked
from conjoin.pipeline.query.tables import Relations
from conjoin.pipeline.query.text_search import TextPlan
from conjoin.pipeline.query.versions import name_versions


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked query. sql: what DuckDB runs; parameters: lists and bytes that are not query vectors.

    questions: what the plan may ask DuckDB, by table and number of the key set, -1 for the outcome of a growth, -2 for
    the vectors that neighbours are looked for; texts: what the full-text index does for a read, by its name in DuckDB;
    repeatable: it holds nothing that may change while its tables do not, and nothing that only one answer can use;
    words: parameters that are words to look for; ranked: a search so plain that its rows need only be put in order.
    """

    tree: exp.Query
    sql: str
    parameters: Mapping[str, object]
    reads: tuple[Read, ...]
    rewritten: Rewritten
    versions: Mapping[str, int]
    questions: Mapping[tuple[str, int], Question]
    texts: Mapping[str, TextPlan]
    classifiers: tuple[Classifier, ...]
    repeatable: bool
    words: frozenset[str]
    ranked: Ranked | None


def prepare(tree: exp.Query, params: Params, relations: Relations, engine: Engine) -> Prepared:
    """Bind, resolve, plan and check a query; its tree is changed. Raises QueryError."""
    words = words_of(tree, by_name(params))
    bound = bind(tree, params)
    others = name_versions(tree, relations)
    analysis = analyse(tree, relations.joined(others))
    curves, texts = relevance.expand(analysis), text_search.expand(analysis, bound)
    classifiers = classification.expand(analysis, bound)
    rewritten = relevance.measured(rewrite(analysis, bound), curves)
    reads = plan_reads(analysis, rewritten)
    planned = {read.reference.name: text_search.plan(analysis, rewritten, read, texts) for read in reads}
    plans = {name: text for name, text in planned.items() if text is not None}
    near = with_neighbours(analysis, rewritten, [read for read in reads if read.reference.name not in plans])
    reads = tuple(_beside(read, near) for read in reads)
    check_crossings(analysis, rewritten, reads)
    for read in reads:
        node, alias = read.reference.node, exp.to_identifier(read.reference.alias, quoted=True)
        node.set("this", exp.to_identifier(read.reference.name, quoted=True))
        if not node.alias:
            node.set("alias", exp.TableAlias(this=alias))
    questions = _questions(reads)
    sql = tree.sql(DIALECT, copy=False)
    zeros = {wanted.name: [0.0] * wanted.column.dim for wanted in rewritten.wanted}
    stubs = [*[c.stub() for c in classifiers], *[e.stub() for e in rewritten.embedded]]
    stubs += [s.function({}) for text in plans.values() for s in text.scores]
    schemas = {r.reference.name: r.reference.relation.schema for r in reads}
    schemas |= {name: schemas[name].append(found.key_field) for name, found in near.items()}
    engine.check(sql, {**bound, **zeros}, schemas, stubs)
    pinned = {r.reference.relation.name: r.reference.relation.dataset for r in reads}
    versions = {name: int(dataset.version) for name, dataset in pinned.items() if dataset is not None}
    sums = any(wanted.kind == "sum" for wanted in rewritten.wanted)  # of parameters too
    repeatable = not (others or curves or classifiers or rewritten.embedded or sums)
    plain = None if curves or plans or classifiers or rewritten.embedded else ranked(tree, reads, rewritten)
    return Prepared(
        tree, sql, bound, reads, rewritten, versions, questions, plans, classifiers, repeatable, words, plain
    )


def _beside(read: Read, near: Mapping[str, Near]) -> Read:
    """A read whose rows are looked for beside others; one whose rows others are looked for delivers their ids."""
    ids = [found.id_column for found in near.values() if found.beside is read.reference and found.id_column]
    read = replace(read, columns=tuple(dict.fromkeys([*read.columns, *ids])))
    if (found := near.get(read.reference.name)) is None:
        return read
    return replace(read, near=found, reason=found.reason, growth=None, within=None, keys=())


def _questions(reads: Sequence[Read]) -> dict[tuple[str, int], Question]:
    """After the tables have their names inside DuckDB."""
    found = {}
    for read in reads:
        for number, keys in enumerate(read.keys):
            found[read.reference.name, number] = keys.question()
        if (growth := read.growth) is not None:
            found[read.reference.name, -1] = outcome(growth.select, growth.measure, growth.need)
        if read.near is not None:
            found[read.reference.name, -2] = read.near.question()
    return found
