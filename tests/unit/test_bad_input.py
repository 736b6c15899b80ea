"""Bad input from end to end, without Ray: plan, embed and stage in this process, land, commit.

One bad row goes to quarantine with a reason, its neighbours are embedded; a bad source or table stops the run by name.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from conjoin.pipeline import commits, landing, quarantine, store
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.draft import base_of, drafting
from conjoin.pipeline.embed import Attempt, EmbedConfig, embed
from conjoin.pipeline.errors import ConjoinError, SourceError, StorageError, TableError
from conjoin.pipeline.freezing import freeze
from conjoin.pipeline.plan import Plan
from conjoin.pipeline.publish import publish
from conjoin.pipeline.runs import run_directory
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.stager import Order, Stager
from conjoin.pipeline.store import TableConfig
from conjoin.pipeline.survey import survey
from conjoin.pipeline.units import read_records


def png(color: str = "red", size: tuple[int, int] = (20, 20), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 as far as its header goes."""
    data = bytearray(png())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def wav(samples: int, rate: int = 16_000, loud: float = 0.5) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, (loud * np.sin(np.arange(samples))).astype(np.float32), rate, format="WAV")
    return out.getvalue()


GOOD = {"text": "red apple", "image": png(), "audio": wav(4_000)}


def catalog_of(folder: Path, encoder: Path, **columns: pa.Array) -> Catalog:
    """A catalog whose rows are these columns (and an id); a modality is one that has a column."""
    count = len(next(iter(columns.values())))
    columns = {"id": pa.array([f"row{number}" for number in range(count)], pa.string())} | columns
    (folder / "source").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "source" / "rows.parquet", row_group_size=3)
    fields = {name: name for name in ("text", "image", "audio") if name in columns}
    return Catalog(
        "things",
        SourceConfig(path=str(folder / "source"), id="id", **fields),  # type: ignore[arg-type]
        str(encoder),
        TableConfig(path=str(folder / "things.lance")),
        EmbedConfig(unit_rows=4),
    )


def planned(catalog: Catalog, run_id: str = "things-1", *, full: bool = False) -> Plan:
    with drafting(catalog, survey(catalog), base_of(catalog.table.path, full=full)) as draft:
        return freeze(draft, run_id, run_directory(catalog.table.path, run_id))


def night(catalog: Catalog, run_id: str = "things-1", *, full: bool = False) -> tuple[pa.Table, pa.Table]:
    """The table and the quarantine after a run."""
    uri = catalog.table.path
    plan = planned(catalog, run_id, full=full)
    head = store.head(uri)
    stager = Stager(Order(catalog, run_id, 0 if head is None else int(head.version)))
    for unit in plan.units:
        stager.stage(unit.number)
    run = run_directory(uri, run_id)
    commits.commit(uri, landing.prepare(uri, run, plan, read_records(run, plan.digest)))
    bad = quarantine.read_quarantine(uri, None)
    if bad is None:
        bad = quarantine.quarantine_schema(pa.string()).empty_table()
    return store.open_version(uri, None).to_table(), bad


def uneven(size: int = 300) -> bytes:
    """A JPEG that does not shrink to nothing."""
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


NO_UTF8 = pa.array([b"red apple", b"caf\xe9", b"blue car"], pa.binary()).view(pa.string())


@dataclass(frozen=True)
class Case:
    """A value among good neighbours, and the reason why it is in quarantine; None if it is embedded."""

    modality: str
    value: object
    stage: str | None
    reason: str = ""


CASES = {
    "empty-caption": Case("text", "", "decode", "empty text"),
    "blank-caption": Case("text", " \n", "decode", "empty text"),
    "megabyte": Case("text", "apple " * 180_000, None),
    "truncated-jpeg": Case("image", uneven()[:5_000], "decode", "image file is truncated"),
    "truncated-png": Case("image", png()[:50], "decode", "cannot decode: OSError"),
    "corrupt": Case("image", b"\x89PNG\r\n\x1a\n" + b"\x17" * 90, "decode", "not a picture that can be read"),
    "zero-bytes": Case("image", b"", "decode", "zero bytes"),
    "not-a-picture": Case("image", b"<html></html>", "decode", "not a picture that can be read (13 bytes"),
    "one-pixel": Case("image", png(size=(1, 1)), None),
    "palette": Case("image", png(mode="P"), None),
    "sixteen-bit": Case("image", png(mode="I;16"), None),
    "bomb": Case("image", bomb(), "decode", "900,000,000 pixels, at most 89,478,485"),
    "silence": Case("audio", wav(4_000, loud=0), "decode", "silence: 4000 samples"),
    "no-samples": Case("audio", wav(0), "decode", "a sound without samples"),
    "not-a-sound": Case("audio", b"OggS" + b"\0" * 60, "decode", "not a sound that can be read (64 bytes)"),
    "odd-rate": Case("audio", wav(4_000, rate=7_919), None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_bad_value_is_quarantined_and_its_neighbours_are_embedded(
    tmp_path: Path, small_encoder: Path, case: Case
) -> None:
    columns = {case.modality: pa.array([GOOD[case.modality], case.value, None, GOOD[case.modality], case.value])}
    others = pa.array(["a cat"] * 5) if case.modality != "text" else pa.array([GOOD["image"]] * 5)
    other = "text" if case.modality != "text" else "image"
    table, bad = night(catalog_of(tmp_path, small_encoder, **columns, **{other: others}))
    assert table["id"].to_pylist() == [f"row{number}" for number in range(5)]
    vectors = [row is not None for row in table[f"{case.modality}_vec"].to_pylist()]
    usable = case.stage is None
    assert vectors == [True, usable, False, True, usable]
    assert table[f"{other}_vec"].null_count == 0
    norms = [np.linalg.norm(row) for row in table[f"{case.modality}_vec"].to_pylist() if row]
    assert norms == pytest.approx([1.0] * len(norms), abs=1e-5)
    found = bad.to_pylist()
    assert [(row["id"], row["row_group"], row["row"]) for row in found] == (
        [] if usable else [("row1", 0, 1), ("row4", 1, 1)]
    )
    for row in found:
        assert (row["modality"], row["stage"], row["run_id"]) == (case.modality, case.stage, "things-1")
        assert case.reason in row["reason"]
        assert row["file"] == str(tmp_path / "source" / "rows.parquet")


def test_text_that_is_not_utf8_leaves_its_neighbours_their_text(tmp_path: Path, small_encoder: Path) -> None:
    catalog = catalog_of(tmp_path, small_encoder, text=NO_UTF8, title=NO_UTF8, image=pa.array([png()] * 3))
    kept = replace(catalog, source=catalog.source.model_copy(update={"keep": ["title"]}))
    table, bad = night(kept)
    assert table["text"].to_pylist() == ["red apple", None, "blue car"]
    assert table["title"].to_pylist() == ["red apple", "caf\ufffd", "blue car"]
    assert [(row["id"], row["reason"]) for row in bad.to_pylist()] == [("row1", "not UTF-8 at byte 3")]


def test_a_record_without_any_value_is_in_quarantine_alone(tmp_path: Path, small_encoder: Path) -> None:
    table, bad = night(catalog_of(tmp_path, small_encoder, text=pa.array(["a", None, "b", ""])))
    assert table["id"].to_pylist() == ["row0", "row2"]
    assert [(row["id"], row["modality"], row["reason"]) for row in bad.to_pylist()] == [
        ("row1", "", "no value in any modality"),
        ("row3", "text", "empty text"),
    ]


def test_nothing_usable_at_all_is_an_empty_table(tmp_path: Path, small_encoder: Path) -> None:
    table, bad = night(catalog_of(tmp_path, small_encoder, text=pa.array(["", None])))
    assert (table.num_rows, bad.num_rows) == (0, 2)


def test_too_many_bad_rows_stop_the_run_with_the_first_reasons(tmp_path: Path, small_encoder: Path) -> None:
    catalog = catalog_of(tmp_path, small_encoder, text=pa.array(["a", "", "b", ""]))
    plan = planned(catalog)
    Stager(Order(catalog, "things-1")).stage(0)
    with pytest.raises(SourceError) as caught:
        embed(catalog, plan, Attempt())
    assert "2 of 4 rows cannot be embedded, 1 may: row1 (text): empty text; row3 (text): empty text" in str(
        caught.value
    )
    assert "raise embed.max_bad_fraction" in str(caught.value)


def test_an_encoder_that_gives_nan_for_some_values(tmp_path: Path) -> None:
    import torch

    from conjoin.encoders.checkpoint import save
    from conjoin.encoders.joint import build
    from conjoin.encoders.options import TowerOptions

    encoder = build({"text": TowerOptions(max_tokens=16, width=16)}, 8, ["red apple", "cat"])
    tower = encoder.tower("text")
    assert tower.tokenizer is not None
    with torch.no_grad():
        broken = tower.tokenizer.encode("\u00a4", add_special_tokens=False).ids[-1]
        tower.backbone.tokens.weight[broken] = torch.nan  # type: ignore[union-attr, index]
    save(encoder, tmp_path / "encoder", {})
    table, bad = night(
        catalog_of(tmp_path, tmp_path / "encoder", text=pa.array(["red", "5 \u00a4", "cat", "a \u00a4"]))
    )
    assert table["id"].to_pylist() == ["row0", "row2"]
    assert np.isfinite(np.array(table["text_vec"].to_pylist())).all()
    assert [(row["id"], row["stage"], row["reason"]) for row in bad.to_pylist()] == [
        ("row1", "embed", "the encoder gave NaN"),
        ("row3", "embed", "the encoder gave NaN"),
    ]


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server: /N.png is a picture, /busy.png one at the second request, all else 404."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("conjoin.pipeline.storage.FIRST_PAUSE_S", 0.001)
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            is_busy = self.path == "/busy.png" and asked.count(self.path) == 1
            known = self.path in ("/1.png", "/2.png", "/busy.png")
            self.send_response(503 if is_busy else 200 if known else 404)
            self.end_headers()
            self.wfile.write(png() if known else b"")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_addresses_that_cannot_be_fetched(tmp_path: Path, small_encoder: Path, shop: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "near.png").write_bytes(png("blue"))
    uris = [f"{shop}/1.png", f"{shop}/gone.png", f"{shop}/busy.png", "near.png", "far.png", "", "gopher://x/y"]
    table, bad = night(catalog_of(tmp_path, small_encoder, image=pa.array(uris)))
    assert table["id"].to_pylist() == ["row0", "row2", "row3"]
    assert table["image_uri"].to_pylist() == [uris[0], uris[2], f"{tmp_path}/source/near.png"]
    assert [(row["id"], row["stage"], row["reason"]) for row in bad.to_pylist()] == [
        ("row1", "fetch", f"nothing there (HTTP 404) [{shop}/gone.png]"),
        ("row4", "fetch", f"no such file [{tmp_path}/source/far.png]"),
        ("row5", "decode", "empty address"),
        (
            "row6",
            "fetch",
            "cannot fetch gopher: addresses [gopher://x/y]. Addresses are files, s3://, http:// or https://",
        ),
    ]


def fatal(catalog: Catalog) -> ConjoinError:
    with pytest.raises(ConjoinError) as caught:
        night(catalog, "things-2")
    return caught.value


def test_a_missing_column_wrong_types_and_ids(tmp_path: Path, small_encoder: Path) -> None:
    catalog = catalog_of(tmp_path, small_encoder, caption=pa.array(["a", "b"]), price=pa.array([1.5, 2.5]))
    file = str(tmp_path / "source" / "rows.parquet")

    def problem(**fields: str) -> ConjoinError:
        return fatal(replace(catalog, source=catalog.source.model_copy(update=fields)))

    cases = {
        "source.text: no column 'captoin'": problem(text="captoin"),
        "source.image: column 'price' is double": problem(image="price"),
        "source.text: column 'price' is double": problem(text="price"),
        "source.id: no column 'key'": problem(id="key", text="caption"),
        "source.id: column 'price' is double": problem(id="price", text="caption"),
    }
    for what, error in cases.items():
        assert type(error) is SourceError
        assert error.what == what
        assert error.where == file
        assert error.next
    assert cases["source.text: no column 'captoin'"].next == "Did you mean 'caption'?"


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a", None, "b"], "column 'id' is null in 1 row(s), {file} row 1. Give every row an id"),
        (["a", "b", "a"], "1 id(s) of column 'id' occur more than once: 'a': {file} row 0 and {file} row 2. Make the"),
        ([7, 7], "'id' occur more than once: 7: {file} row 0 and {file} row 1"),
    ],
    ids=["null", "twice", "number-twice"],
)
def test_ids_that_are_no_keys(tmp_path: Path, small_encoder: Path, ids: list[object], words: str) -> None:
    error = fatal(catalog_of(tmp_path, small_encoder, id=pa.array(ids), text=pa.array(["x"] * len(ids))))
    assert isinstance(error, SourceError)
    assert words.format(file=tmp_path / "source" / "rows.parquet") in str(error)


def test_a_missing_file_an_empty_glob_no_rows(tmp_path: Path, small_encoder: Path) -> None:
    catalog = catalog_of(tmp_path, small_encoder, text=pa.array([], pa.string()))

    def problem(path: str) -> str:
        return str(fatal(catalog.reading([path])))

    assert problem(f"{tmp_path}/x.parquet") == (
        f"no such file or directory [{tmp_path}/x.parquet]. Correct source.path in the run file"
    )
    assert f"no file matches [{tmp_path}/*.pq]. Check the pattern" in problem(f"{tmp_path}/*.pq")
    assert problem(f"{tmp_path}/source") == f"no rows in 1 file(s) [{tmp_path}/source]"


def test_a_file_torn_after_it_was_listed(tmp_path: Path, small_encoder: Path) -> None:
    catalog = catalog_of(tmp_path, small_encoder, text=pa.array([f"word {n}" for n in range(2_000)]))
    file = tmp_path / "source" / "rows.parquet"
    data = bytearray(file.read_bytes())
    data[200:1_000] = b"\xff" * 800
    file.write_bytes(bytes(data))
    error = fatal(catalog)
    assert isinstance(error, SourceError)
    assert str(file) in str(error)
    assert "Write the file again" in str(error)


def test_a_file_replaced_while_the_run_reads_it(tmp_path: Path, small_encoder: Path) -> None:
    catalog = catalog_of(tmp_path, small_encoder, text=pa.array(["a", "b", "c"]))
    planned(catalog)
    catalog_of(tmp_path, small_encoder, id=pa.array(["x", "y", "z"]), text=pa.array(["a", "b", "c"]))
    with pytest.raises(SourceError, match=r"ids differ from the plan.*rows\.parquet row group 0.*next night"):
        Stager(Order(catalog, "things-1")).stage(0)


def test_ids_of_another_type_take_a_whole_new_table(tmp_path: Path, small_encoder: Path) -> None:
    catalog = catalog_of(tmp_path, small_encoder, text=pa.array(["a", ""]))
    before, _ = night(catalog)
    publish(catalog.table.path, 1, "things-1")
    numbers = catalog_of(tmp_path, small_encoder, id=pa.array([1, 2]), text=pa.array(["a", ""]))
    error = fatal(numbers)
    assert isinstance(error, SourceError)
    assert "source.id: column 'id' is int64 here, but string in the live version" in str(error)
    assert "--full" in error.next
    assert store.open_version(catalog.table.path, None).to_table() == before
    table, bad = night(numbers, "things-3", full=True)
    assert table["id"].to_pylist() == [1]
    assert bad["id"].to_pylist() == ["2"]


def test_a_table_of_somebody_else(tmp_path: Path, small_encoder: Path) -> None:
    catalog = catalog_of(tmp_path, small_encoder, text=pa.array(["a"]))
    theirs = pa.table({"id": ["theirs"]})
    lance.write_dataset(theirs, catalog.table.path)
    error = fatal(catalog)
    assert isinstance(error, TableError)
    assert "was not made by conjoin" in error.what
    assert error.next == "Give table.path another name"
    assert lance.dataset(catalog.table.path).to_table() == theirs


def test_a_torn_or_missing_encoder(tmp_path: Path, small_encoder: Path) -> None:
    catalog = catalog_of(tmp_path, small_encoder, text=pa.array(["a"]))
    missing = fatal(replace(catalog, encoder=str(tmp_path / "nothing")))
    assert str(missing).startswith(f"no encoder there (no spec.json) [{tmp_path}/nothing]. Train one")
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in small_encoder.iterdir():
        (torn / file.name).write_bytes(file.read_bytes()[: 4_000 if file.suffix == ".safetensors" else None])
    error = fatal(replace(catalog, encoder=str(torn)))
    assert "not a usable encoder" in str(error)
    assert "torn" in str(error)


_FULL = """
import os, subprocess, sys
from pathlib import Path
folder, encoder = Path(sys.argv[1]), Path(sys.argv[2])
disk = folder / "disk"
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "full", str(disk)], check=True)
print("mounted", flush=True)
(disk / "ballast").write_bytes(bytes(3_600_000))
sys.path.insert(0, sys.argv[3])
import test_bad_input as t
catalog = t.catalog_of(folder, encoder, text=t.pa.array([os.urandom(20_000).hex() for _ in range(40)]))
catalog = t.replace(catalog, table=t.TableConfig(path=str(disk / "things.lance")))
print(type(error := t.fatal(catalog)).__name__, error)
print(t.store.head(catalog.table.path))
(disk / "ballast").unlink()
print(t.night(catalog, "things-2")[0].num_rows)
"""


def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_space(tmp_path: Path, small_encoder: Path) -> None:
    """A real file system of 4 MB, in a mount namespace of its own."""
    (tmp_path / "disk").mkdir()
    place = ["unshare", "--mount", "--map-root-user", sys.executable, "-c", _FULL]
    try:
        done = subprocess.run(
            [*place, str(tmp_path), str(small_encoder), str(Path(__file__).parent)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if "mounted" not in done.stdout:
        pytest.skip(f"this machine allows no mount: {done.stderr.strip()[-100:]}")
    assert done.returncode == 0, done.stderr
    _, error, head, rows = done.stdout.splitlines()
    assert error.startswith("StorageError cannot ")
    assert f"the disk is full [{tmp_path}/disk/things." in error
    assert error.endswith("Free space and repeat the command")
    assert (head, rows) == ("None", "40")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The endpoint of an S3 server that asks for valid keys; nobody has any."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    _post(f"{endpoint}/moto-api/reset-auth", b"0")
    yield endpoint
    _post(f"{endpoint}/moto-api/reset-auth", b"inf")
    server.stop()


def _post(uri: str, body: bytes) -> None:
    urllib.request.urlopen(urllib.request.Request(uri, body, {"Content-Type": "text/plain"})).close()


def on_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr("conjoin.pipeline.storage.FIRST_PAUSE_S", 0.001)
    settings = {"AWS_ACCESS_KEY_ID": "wrong", "AWS_SECRET_ACCESS_KEY": "wrong", "AWS_REGION": "us-east-1"}
    for name, value in {**settings, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("part", ["source", "table", "encoder"])
def test_wrong_credentials(
    tmp_path: Path, small_encoder: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    on_s3(monkeypatch, bucket)
    error = fatal(moved(catalog_of(tmp_path, small_encoder, text=pa.array(["a"])), part))
    assert isinstance(error, StorageError)
    assert "S3 denied access" in error.what
    assert "s3://shop/" in error.where
    assert "AWS_ACCESS_KEY_ID" in error.next
    assert "\n" not in str(error)


def moved(catalog: Catalog, part: str) -> Catalog:
    if part == "source":
        return catalog.reading(["s3://shop/catalog/"])
    if part == "encoder":
        return replace(catalog, encoder="s3://shop/encoder")
    return replace(catalog, table=TableConfig(path="s3://shop/things.lance"))


def test_an_s3_server_that_does_not_answer(
    tmp_path: Path, small_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_s3(monkeypatch, "http://127.0.0.1:9")
    error = fatal(moved(catalog_of(tmp_path, small_encoder, text=pa.array(["a"])), "source"))
    assert isinstance(error, StorageError)
    assert "no answer from http://127.0.0.1:9" in error.what
    assert "s3://shop/" in error.where
    assert error.next == "Check AWS_ENDPOINT_URL, the network and that the server runs"
