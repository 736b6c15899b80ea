"""What tests of gates share."""

from __future__ import annotations

from typing import Any

from conjoin.pipeline import index, source, store
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.embed import EmbedConfig
from conjoin.pipeline.gates import Expected, GateResult

FINGERPRINT = "0123456789abcdef0123456789abcdef"
COLUMNS = ("image_vec", "text_vec")


def expected(num_rows: int, fingerprint: str = FINGERPRINT, columns: tuple[str, ...] = COLUMNS) -> Expected:
    return Expected(num_rows, fingerprint, columns)


def by_name(results: tuple[GateResult, ...]) -> dict[str, GateResult]:
    return {result.name: result for result in results}


def catalog(uri: str, path: str = "", encoder: str = "", **options: Any) -> Catalog:
    """Of a table; `path` and `encoder` where gates ask them."""
    config = source.SourceConfig(path=path or "nowhere.parquet", id="id", text="caption", **options)
    return Catalog("nights", config, encoder, store.TableConfig(path=uri), EmbedConfig())


def build(uri: str) -> Any:
    index.build(uri, store.TableConfig(path=uri, ann_recall=0.9), exact_floats=1000)
    return store.open_version(uri, None)
