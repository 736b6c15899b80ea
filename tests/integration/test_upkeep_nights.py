"""What looks after a table's past, between real nights: the night after it equals one made anew."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop import Shop, open_shop, row

from conjoin.pipeline import store
from conjoin.pipeline.cleaning import clean, rubbish
from conjoin.pipeline.delta import export_delta
from conjoin.pipeline.erasure import forget
from conjoin.pipeline.upkeep import Upkeep


@pytest.fixture
def shop(tmp_path: Path, things_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    made = open_shop(tmp_path, things_encoder, monkeypatch)
    made.night()
    return made


def changes(shop: Shop) -> None:
    """A night of each kind."""
    shop.write(a=[row(0), row(1, caption="green"), *(row(n) for n in range(3, 8)), row(100)])
    shop.night()
    shop.write(b=[row(n, price=n / 2) for n in range(8, 14)])
    shop.night()
    shop.write(c=[row(n) for n in range(15, 18)])
    shop.night()


def uri(shop: Shop) -> str:
    return str(shop.folder / "things.lance")


def test_a_delta_over_three_nights_replays(shop: Shop, tmp_path: Path) -> None:
    before = shop.table()
    changes(shop)
    found = export_delta(uri(shop), str(tmp_path / "out"), since="things-2026-01-01")
    assert (found.upserts, found.deletes) == (2 + 6, 2)
    parts = {file.kind: pq.read_table(tmp_path / "out" / file.path) for file in found.files}
    upserts, deletes = parts["upserts"], parts["deletes"]
    gone = {*upserts["id"].to_pylist(), *deletes["id"].to_pylist()}
    stayed = before.filter(pa.array([key not in gone for key in before["id"].to_pylist()]))
    after = shop.table()
    assert pa.concat_tables([stayed.select(after.schema.names), upserts]).sort_by("id").to_pylist() == after.to_pylist()


def test_the_night_after_cleaning(shop: Shop) -> None:
    changes(shop)
    late = dt.datetime.now(dt.UTC) + dt.timedelta(days=100)
    found = rubbish(uri(shop), Upkeep(keep_versions=1, keep_days=1, keep_run_days=1), late)
    assert len(found.versions) > 2
    clean(found)
    assert shop.night().status == "unchanged"
    shop.write(a=[row(0), row(1, caption="blue"), row(101)])
    shop.night()
    assert sorted(shop.embedded) == [("image", 1), ("text", 1), ("text", 1)]
    shop.check()


def test_the_night_after_forgetting(shop: Shop) -> None:
    changes(shop)
    shop.write(b=[row(n, price=n / 2) for n in range(8, 14) if n != 10])
    done = forget(uri(shop), ["r10"], shop.config().source)
    assert done.proven
    assert (done.rows, done.warnings) == (1, ())
    assert shop.night().status in ("published", "unchanged")
    shop.check()
    shop.write(c=[row(n) for n in range(15, 19)])
    shop.night()
    assert dict(shop.embedded) == {"image": 1, "text": 1}
    shop.check()


def test_many_nights_are_put_together(shop: Shop) -> None:
    shop.more = {"upkeep": {"small_fragments": 4}}
    for number in range(6):
        shop.write(c=[row(n) for n in range(14, 18)] + [row(200 + n) for n in range(number + 1)])
        shop.night()
    assert len(store.open_version(uri(shop)).get_fragments()) <= 5
    shop.check()
