"""FOR VERSION AS OF: which version of a table a query names, and that version as a relation of its own.

Assumes: times without a zone are UTC. The version of a time is the one that was live then, by the table's history; a
word is a tag or the run that published. The handle of a version never changes.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sqlglot import exp

from conjoin.pipeline import store
from conjoin.pipeline.errors import QueryError, TableError
from conjoin.pipeline.query.parse import DIALECT
from conjoin.pipeline.query.relations import Relation, nearest_name, table_relation

if TYPE_CHECKING:
    import lance

    from conjoin.pipeline.publish import Entry

_MOMENTS = (exp.DType.TIMESTAMP, exp.DType.TIMESTAMPTZ, exp.DType.TIMESTAMPNTZ, exp.DType.DATE)
_FORMS = "Versions are FOR VERSION AS OF 42, 'previous', 'a run id' or TIMESTAMP '2026-03-01 12:00:00'"


def name_versions(tree: exp.Query, relations: Mapping[str, Relation]) -> dict[str, Relation]:
    """Take FOR VERSION AS OF out of the tree: the table gets a name of its own (`things@7`) for that version.

    Returns the new relations by that name. Raises QueryError for a version that is not there, or not named as one.
    """
    found: dict[str, Relation] = {}
    for node in list(tree.find_all(exp.Table)):
        wanted = node.args.get("version")
        if wanted is None:
            continue
        relation = relations.get(node.name.lower())
        if relation is None:
            raise QueryError(f"there is no table {node.name!r}{nearest_name(node.name, relations)}")
        if relation.dataset is None:
            raise QueryError(f"{relation.name} is not a Lance table: it has no versions", where=node.sql(DIALECT))
        dataset = _open(relation, wanted, node.sql(DIALECT))
        name = f"{relation.name}@{dataset.version}"
        found.setdefault(name.lower(), table_relation(name, relation.uri, dataset))
        if not node.alias:
            node.set("alias", exp.TableAlias(this=node.this.copy()))
        node.set("this", exp.to_identifier(name, quoted=True))
        node.set("version", None)
    return found


def _open(relation: Relation, wanted: exp.Version, where: str) -> lance.LanceDataset:
    assert relation.dataset is not None
    version = _version(relation, wanted, where)
    if version == relation.dataset.version:
        return relation.dataset
    try:
        return store.open_version(relation.uri, version)
    except TableError as error:
        raise QueryError(error.what, where=where, next=error.next) from None


def _version(relation: Relation, wanted: exp.Version, where: str) -> int | str:
    value = wanted.expression
    if str(wanted.args.get("kind")).upper() != "AS OF" or not isinstance(value, exp.Expr):
        raise QueryError("this is not a version", where=where, next=_FORMS)
    value = value.unnest()
    timed = str(wanted.this).upper() == "TIMESTAMP"
    if isinstance(value, exp.Cast) and value.to.this in _MOMENTS and isinstance(value.this, exp.Literal):
        value, timed = value.this, True
    if not isinstance(value, exp.Literal) or (timed and not value.is_string):
        raise QueryError("this is not a version", where=where, next=_FORMS)
    if timed:
        return _live_at(relation, value.this, where)
    if not value.is_string:
        if not value.this.isdigit():
            raise QueryError(f"{value.this} is not a version number", where=where, next=_FORMS)
        return int(value.this)
    return _named(relation, value.this, where)


def _named(relation: Relation, word: str, where: str) -> int | str:
    assert relation.dataset is not None
    tags = relation.dataset.tags.list()
    if word in tags:
        return int(tags[word]["version"])
    if word.isdigit():
        return int(word)
    entries = _history(relation)
    published = next((entry.version for entry in entries if entry.run_id == word), None)
    if published is None:
        near = nearest_name(word, [*tags, *[entry.run_id for entry in entries if entry.run_id]])
        raise QueryError(f"{relation.name} has no version {word!r}{near}", where=where)
    return published


def _live_at(relation: Relation, text: str, where: str) -> int:
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise QueryError(f"{text!r} is not a time", where=where, next="For example '2026-03-01 12:00:00'") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    entries = _history(relation)
    found = next((entry.version for entry in entries if dt.datetime.fromisoformat(entry.at) <= moment), None)
    if found is None:
        first = f"its first version was published at {entries[-1].at}" if entries else "it was never published"
        raise QueryError(f"no version of {relation.name} was live at {text}: {first}", where=where)
    return found


def _history(relation: Relation) -> tuple[Entry, ...]:
    """Newest first."""
    from conjoin.pipeline.publish import history

    return history(relation.uri)
