"""conjoin in the query bench: the SQL that docs/sql.md would have people write, over a table as a night leaves it.

Assumes: nothing is set by hand; index, probes and refinement are what the night's indexing and the planner choose.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import lance
import numpy as np
import pyarrow as pa
from query_data import DIM, JOINED, Data, K, encoder

from conjoin.pipeline import full_text, index, store
from conjoin.pipeline.embedder import read_spec
from conjoin.pipeline.query import open_table

NEAREST = f"SELECT id, distance(image_vec, $v) AS d FROM things ORDER BY d LIMIT {K}"
FILTERED = f"SELECT id, distance(image_vec, $v) AS d FROM things WHERE stock < $most ORDER BY d LIMIT {K}"
BATCHED = f"""
    SELECT asked.q, near.id
    FROM asked, LATERAL (SELECT id, distance(image_vec, asked.v) AS d FROM things ORDER BY d LIMIT {K}) near"""
PAIRS = f"""
    SELECT a.id, b.id AS other
    FROM things a JOIN things b ON distance(a.image_vec, b.image_vec) < $radius AND a.id <> b.id
    WHERE a.stock < {JOINED}"""
HYBRID = f"SELECT id, hybrid(image_vec, title, $words) AS score FROM things ORDER BY score DESC LIMIT {K}"


class Conjoin:
    """A published table with its indexes; every question is one sql()."""

    def build(self, data: Data) -> None:
        uri = f"{data.folder}/conjoin/things.lance"
        shutil.rmtree(f"{data.folder}/conjoin", ignore_errors=True)
        lance.write_dataset(rows(data), uri, data_storage_version=store.STORAGE_VERSION)
        config = store.TableConfig(path=uri, full_text=("title",))
        self.reports = index.build(uri, config)
        full_text.index_texts(uri, config.full_text)
        head = lance.dataset(uri)
        head.tags.create("live", head.version)
        self.table = open_table(uri)

    def ladder(self) -> Iterator[str]:
        found = next(report for report in self.reports if report.column == "image_vec")
        step = self.table.explain(NEAREST, {"v": np.ones(DIM)}).steps[0]
        yield f"{found.kind}, nprobes {step.probes}, refine {found.refine}" if found.nprobes else "exact"

    def search(self, query: np.ndarray, most: int | None) -> list[int]:
        if most is None:
            return self._column("id", NEAREST, {"v": query})
        return self._column("id", FILTERED, {"v": query, "most": most})

    def batch(self, queries: np.ndarray) -> list[list[int]]:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(queries.ravel()), queries.shape[1])
        asked = pa.table({"q": pa.array(range(len(queries)), pa.int64()), "v": vectors})
        found = self.table.sql(BATCHED, asked=asked).to_arrow()
        answers: list[list[int]] = [[] for _ in queries]
        for query, row in zip(found["q"].to_pylist(), found["id"].to_pylist(), strict=True):
            answers[query].append(row)
        return answers

    def pairs(self, radius: float) -> set[tuple[int, int]]:
        found = self.table.sql(PAIRS, {"radius": radius}).to_arrow()
        return set(zip(found["id"].to_pylist(), found["other"].to_pylist(), strict=True))

    def hybrid(self, query: np.ndarray, words: str) -> list[int]:
        """The words' own vector, embedded once: the warm-up has asked for all of them."""
        return self._column("id", HYBRID, {"words": words})

    def hybrid_recall(self, words: list[str]) -> float:
        """Share of the scores of the exact answers that are reached."""
        reached = []
        for some in words:
            scores = [
                self.table.sql(HYBRID, {"words": some}, exact=exact).to_arrow()["score"].to_numpy()
                for exact in (False, True)
            ]
            reached.append(np.mean(scores[0] >= scores[1][-1] - 1e-9))
        return float(np.mean(reached))

    def _column(self, name: str, sql: str, params: dict[str, object]) -> list[int]:
        return list(self.table.sql(sql, params).to_arrow()[name].to_pylist())


def rows(data: Data) -> pa.Table:
    """With the metadata of an encoder's column."""
    folder = str(encoder(data.folder.parent))
    fingerprint, dim = read_spec(folder)[1], data.vectors.shape[1]
    columns: dict[str, pa.Array] = {
        "id": pa.array(np.arange(len(data.vectors))),
        "stock": pa.array(data.stock),
        "title": pa.array(data.titles),
    }
    fields = [pa.field(name, values.type) for name, values in columns.items()]
    facts = {"fingerprint": fingerprint, "modality": "image", "metric": "cosine", "dim": dim, "encoder": folder}
    metadata = {f"{store.PREFIX}{name}": str(value) for name, value in facts.items()}
    columns["image_vec"] = pa.FixedSizeListArray.from_arrays(pa.array(data.vectors.ravel()), dim)
    fields.append(pa.field("image_vec", pa.list_(pa.float32(), dim), metadata=metadata))
    return pa.table(columns, schema=pa.schema(fields))
