"""Every attempt to write, to read files or to look at the machine fails, says why, and touches nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline.errors import ConjoinError
from conjoin.pipeline.query import Table, open_table

SECRET = "the launch code is 4711"
# {csv}, {parquet}, {text}: files that are there; {new}: one that is not; {folder}: theirs.
ATTEMPTS = r"""
COPY things TO '{new}.csv'
COPY (SELECT * FROM things) TO '{new}.parquet' (FORMAT parquet)
COPY things FROM '{csv}'
COPY FROM DATABASE memory TO x
EXPORT DATABASE '{new}'
IMPORT DATABASE '{folder}'
ATTACH '{new}.db'
ATTACH '{new}.db' AS x (TYPE sqlite)
DETACH memory
INSTALL httpfs
FORCE INSTALL httpfs
LOAD httpfs
LOAD '{text}'
PRAGMA database_list
PRAGMA enable_profiling
PRAGMA table_info('{csv}')
SET enable_external_access = true
SET lock_configuration = false
SET GLOBAL threads = 1
SET VARIABLE x = 1
RESET threads
USE memory
CREATE TABLE x AS SELECT 1
CREATE OR REPLACE TABLE things AS SELECT 1
CREATE TEMP TABLE x AS SELECT * FROM '{csv}'
CREATE VIEW x AS SELECT 1
CREATE MACRO f(a) AS a + 1
CREATE SECRET s (TYPE s3, KEY_ID 'a', SECRET 'b')
CREATE SEQUENCE s
CREATE TYPE t AS ENUM ('a')
CREATE SCHEMA s
INSERT INTO things VALUES (1)
UPDATE things SET price = 0
DELETE FROM things
MERGE INTO things USING things t ON true WHEN MATCHED THEN DELETE
TRUNCATE things
DROP TABLE things
ALTER TABLE things ADD COLUMN x INT
COMMENT ON TABLE things IS 'x'
VACUUM
CHECKPOINT
BEGIN TRANSACTION
CALL pragma_version()
PREPARE p AS SELECT 1
EXECUTE p
DEALLOCATE p
DESCRIBE '{csv}'
SUMMARIZE '{csv}'
SHOW ALL TABLES
PIVOT '{csv}' ON a USING count(*)
UNPIVOT '{csv}' ON a INTO NAME n VALUE v
EXPLAIN ANALYZE COPY things TO '{new}.csv'
ANALYZE things
SELECT 1; COPY things TO '{new}.csv'
SELECT 1;;DROP TABLE things
SELECT id FROM things INTO OUTFILE '{new}.csv'
SELECT id INTO x FROM things
SELECT id FROM things FOR UPDATE
WITH a AS (DELETE FROM things RETURNING *) SELECT * FROM a
WITH a AS (INSERT INTO things VALUES (1) RETURNING *) SELECT * FROM a
WITH a AS (UPDATE things SET price = 0 RETURNING *) SELECT * FROM a
WITH a AS (COPY things TO '{new}.csv') SELECT * FROM a
WITH a AS (SELECT * FROM '{csv}') SELECT * FROM a
WITH a AS MATERIALIZED (FROM read_csv('{csv}')) SELECT * FROM a
WITH RECURSIVE a AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM a, '{csv}' WHERE n < 2) SELECT * FROM a
WITH things AS (FROM '{parquet}') SELECT * FROM things
SELECT * FROM (DESCRIBE '{csv}')
SELECT * FROM (SUMMARIZE '{csv}')
SELECT * FROM (SHOW TABLES)
SELECT * FROM (PIVOT '{csv}' ON a USING count(*))
SELECT * FROM '{csv}'
SELECT * FROM '{parquet}'
SELECT * FROM "{csv}"
SELECT * FROM "{parquet}" AS t
FROM '{csv}'
TABLE '{csv}'
TABLE "{csv}"
SELECT * FROM '/etc/passwd'
SELECT * FROM 's3://bucket/x.parquet'
SELECT * FROM 'https://example.org/x.csv'
SELECT * FROM things, '{csv}'
SELECT * FROM things POSITIONAL JOIN '{csv}'
SELECT * FROM things ASOF JOIN '{csv}' c ON things.id >= c.a
SELECT id FROM things WHERE id IN (SELECT a FROM '{csv}')
SELECT id FROM things WHERE EXISTS (FROM read_text('{text}'))
SELECT id FROM things WHERE id = (SELECT content FROM read_text('{text}'))
SELECT (SELECT content FROM read_text('{text}')) AS x
SELECT * FROM read_csv('{csv}')
SELECT * FROM read_csv_auto(['{csv}'])
SELECT * FROM read_parquet('{parquet}')
SELECT * FROM read_parquet(['{parquet}', '{parquet}'])
SELECT * FROM parquet_scan('{parquet}')
SELECT * FROM read_json('{text}')
SELECT * FROM read_json_auto('{text}')
SELECT * FROM read_json_objects('{text}')
SELECT * FROM read_ndjson('{text}')
SELECT * FROM read_text('{text}')
SELECT * FROM read_blob('{text}')
SELECT * FROM READ_TEXT('{text}')
SELECT * FROM "read_text"('{text}')
SELECT * FROM read_text/**/('{text}')
SELECT * FROM main.read_text('{text}')
SELECT * FROM system.main.read_text('{text}')
SELECT * FROM glob('{folder}/*')
SELECT * FROM range(1), glob('{folder}/*')
SELECT * FROM range(1) t, LATERAL read_text('{text}')
SELECT * FROM things t, LATERAL (SELECT * FROM read_text(t.id))
SELECT * FROM sniff_csv('{csv}')
SELECT * FROM parquet_metadata('{parquet}')
SELECT * FROM parquet_schema('{parquet}')
SELECT * FROM parquet_file_metadata('{parquet}')
SELECT * FROM parquet_kv_metadata('{parquet}')
SELECT * FROM arrow_scan(1, 2, 3)
SELECT * FROM pandas_scan(1)
SELECT * FROM seq_scan('things')
SELECT * FROM sqlite_scan('{text}', 'x')
SELECT * FROM postgres_scan('', '', '')
SELECT * FROM iceberg_scan('{folder}')
SELECT * FROM delta_scan('{folder}')
SELECT * FROM st_read('{text}')
SELECT * FROM query('SELECT 1')
SELECT * FROM query('FROM ''{csv}''')
SELECT * FROM query_table('{csv}')
SELECT * FROM query_table(['{csv}'])
SELECT * FROM duckdb_settings()
SELECT * FROM duckdb_secrets()
SELECT * FROM duckdb_functions()
SELECT * FROM duckdb_settings
SELECT * FROM sqlite_master
SELECT * FROM pg_tables
SELECT * FROM pg_catalog.pg_class
SELECT * FROM information_schema.tables
SELECT * FROM system.information_schema.tables
SELECT * FROM memory.main.things
SELECT * FROM main.things
SELECT * FROM __t0
SELECT * FROM frame
SELECT * FROM self
SELECT * FROM pragma_table_info('things')
SELECT * FROM pragma_database_list()
SELECT * FROM which_secret('s3://x', 's3')
SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))
SELECT * FROM repeat_row(1, num_rows := 2)
SELECT * FROM unknown_function(1)
SELECT getenv('SAFETY_SECRET') AS x
SELECT GetEnv('SAFETY_SECRET') AS x
SELECT "getenv"('SAFETY_SECRET') AS x
SELECT 'SAFETY_SECRET'.getenv() AS x
SELECT ('SAFETY_SECRET').getenv() AS x
SELECT main.getenv('SAFETY_SECRET') AS x
SELECT system.main.getenv('SAFETY_SECRET') AS x
SELECT list_transform(['SAFETY_SECRET'], x -> getenv(x)) AS x
SELECT list_transform(['SAFETY_SECRET'], lambda x: getenv(x)) AS x
SELECT [getenv(x) FOR x IN ['SAFETY_SECRET']] AS x
SELECT list_aggregate(['a'], 'getenv') || getenv('SAFETY_SECRET') AS x
SELECT id FROM things ORDER BY getenv('SAFETY_SECRET')
SELECT count(*) FILTER (WHERE getenv('SAFETY_SECRET') = 'x') AS x FROM things
SELECT id FROM things LIMIT (SELECT length(getenv('SAFETY_SECRET')))
SELECT current_setting('threads') AS x
SELECT getvariable('x') AS x
SELECT nextval('s') AS x
SELECT write_log('x') AS x
SELECT read_text('{text}') AS x
SELECT pg_read_file('{text}') AS x
SELECT file_exists('{text}') AS x
SELECT distance(image_vec, image('{text}')) AS x FROM things
SELECT id FROM things AT (VERSION => 1), '{csv}'
VALUES (getenv('SAFETY_SECRET'))
VALUES ((SELECT content FROM read_text('{text}')))
SELECT * FROM (VALUES (1)) t(a) JOIN '{csv}' USING (a)
SELECT 1 UNION ALL SELECT a FROM '{csv}'
SELECT * FROM things QUALIFY row_number() OVER (ORDER BY getenv('SAFETY_SECRET')) = 1
SELECT COLUMNS(x -> getenv('SAFETY_SECRET') = x) FROM things
SELECT * REPLACE (getenv('SAFETY_SECRET') AS id) FROM things
SELECT * FROM \uff52ead_text('{text}')
SELECT \uff47\uff45\uff54\uff45\uff4e\uff56('SAFETY_SECRET') AS x
SELECT get\u200benv('SAFETY_SECRET') AS x
SELECT * FROM \u2018{csv}\u2019
\u200bCOPY things TO '{new}.csv'
\ufeffDROP TABLE things
SELECT * FROM things\u00a0, '{csv}'
-- a comment\nCOPY things TO '{new}.csv'
/* SELECT */ COPY things TO '{new}.csv'
SELECT 1 /* ; */; /* */ COPY things TO '{new}.csv'
SELECT $$a$$; DROP TABLE things
SELECT 'a''; DROP TABLE things; --'; DROP TABLE things
SELECT E'\\'; DROP TABLE things
FROM (FROM '{csv}')
(FROM '{csv}')
SELECT * FROM ('{csv}')
SELECT * FROM [1], '{csv}'
.read {text}
\\copy things TO '{new}.csv'
""".strip().splitlines()
CLEAR = (
    r"not allowed|not known|there is no (table|function|column)|syntax error|one statement at a time|is not a table|"
    r"has no image tower|cannot be named|hint comments|does not say where its encoder|cannot be decoded|not a picture"
)


def written(attempt: str) -> str:
    """Escapes of the list above as characters."""
    return attempt.encode("ascii").decode("unicode_escape")


@pytest.fixture(scope="module")
def table(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Table:
    return open_table(make_table_at(f"{tmp_path_factory.mktemp('safe')}/things.lance", 5, dim=4).uri)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Files to attack, in the current directory; whatever is there afterwards must be what was there before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAFETY_SECRET", SECRET)
    (tmp_path / "x.csv").write_text(f"a\n{SECRET}\n")
    (tmp_path / "x.txt").write_text(SECRET)
    pq.write_table(pa.table({"a": [SECRET]}), tmp_path / "x.parquet")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    yield {
        "csv": "x.csv",
        "text": str(tmp_path / "x.txt"),
        "parquet": str(tmp_path / "x.parquet"),
        "new": "new",
        "folder": str(tmp_path),
    }
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_attempt_fails_clearly_and_touches_nothing(table: Table, files: dict[str, str], attempt: str) -> None:
    frame = pa.table({"a": [SECRET]})  # DuckDB's replacement scans would find it
    with pytest.raises(ConjoinError, match=CLEAR) as caught:
        table.sql(written(attempt).format_map(files) if "{" in attempt else written(attempt))
    assert SECRET not in str(caught.value)
    assert frame.num_rows == 1
    assert table.sql("SELECT count(*) AS n FROM things").to_pylist() == [{"n": 5}]
    assert table.version == 1


def test_there_are_enough_attempts() -> None:
    assert len(set(ATTEMPTS)) == len(ATTEMPTS) >= 60
