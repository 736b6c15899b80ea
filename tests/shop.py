"""A small catalog for tests of nights: its source files, its nights without Ray, what they embedded."""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conjoin.jobs.config import RunFile
from conjoin.jobs.nightly import run
from conjoin.pipeline import embed, embedder, store
from conjoin.pipeline.night import Night
from conjoin.pipeline.plan import load_plan
from conjoin.pipeline.runs import run_directory
from conjoin.pipeline.stager import Order, Stager

DATE = dt.date(2026, 1, 1)
Row = dict[str, object]


def picture(number: int) -> bytes:
    out = io.BytesIO()
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def row(number: int, **changes: object) -> Row:
    return {
        "id": f"r{number}",
        "picture": picture(number),
        "caption": f"red apple {number}",
        "price": float(number),
        "updated": 0,
        **changes,
    }


def same(found: pa.Table | None, wanted: pa.Table) -> bool:
    """Equal ids, kept values and hashes; vectors but for the last bits, null where null."""
    if found is None or found["id"].to_pylist() != wanted["id"].to_pylist():
        return False
    for name in wanted.schema.names:
        if not name.endswith("_vec"):
            if found[name].to_pylist() != wanted[name].to_pylist():
                return False
            continue
        ours, theirs = ([value or [np.inf] * 8 for value in table[name].to_pylist()] for table in (found, wanted))
        if not np.allclose(ours, theirs, atol=1e-6):
            return False
    return True


@dataclass
class Shop:
    """A catalog of a few files in a folder, its nights, and what they embedded."""

    folder: Path
    encoder: Path
    embedded: list[tuple[str, int]] = field(default_factory=list)
    staging: bool = False
    source: dict[str, object] = field(default_factory=dict)
    more: dict[str, object] = field(default_factory=dict)

    def write(self, **files: Sequence[Row] | None) -> None:
        """Source files by name; None removes one."""
        where = self.folder / "source"
        where.mkdir(exist_ok=True)
        for name, rows in files.items():
            path = where / f"{name}.parquet"
            if rows is None:
                path.unlink()
                continue
            beside = path.with_suffix(".new")
            pq.write_table(pa.Table.from_pylist(list(rows)), beside, row_group_size=3)
            beside.replace(path)

    def config(self, where: str = "things.lance", **changes: object) -> RunFile:
        source = {"path": str(self.folder / "source"), "id": "id", "image": "picture", "text": "caption"}
        fields: dict[str, object] = {
            "name": "things",
            "source": {**source, "keep": ["price"], "split": {"validation": 0, "test": 0}, **self.source},
            "encoder": str(self.encoder),
            "table": {"path": str(self.folder / where)},
            "embed": {"unit_rows": 4},
            "gates": {"row_change": 10, "quarantine": 1, "hit_at_10_drop": 1},
        }
        return RunFile.model_validate({**fields, **self.more, **changes})

    def night(self, **changes: object) -> Night:
        self.embedded.clear()
        return run(self.config(**changes), DATE)

    def table(self, name: str = "things.lance") -> pa.Table:
        return store.open_version(str(self.folder / name)).to_table().sort_by("id")

    def check(self) -> None:
        """The table equals one that is made anew."""
        embedded = list(self.embedded)
        again = f"again{len(list(self.folder.glob('again*.lance')))}.lance"
        run(self.config(again), DATE)
        ours, theirs = self.table(), self.table(again)
        assert {field.name: field.type for field in ours.schema} == {field.name: field.type for field in theirs.schema}
        assert ours["id"].to_pylist() == theirs["id"].to_pylist()
        for name in ours.schema.names:
            if name.endswith("_vec"):
                mine, other = (np.array([v or [0] * 8 for v in t[name].to_pylist()]) for t in (ours, theirs))
                np.testing.assert_allclose(mine, other, atol=1e-6)
            else:
                assert ours[name].to_pylist() == theirs[name].to_pylist(), name
        self.embedded[:] = embedded

    def plan(self, report: Night) -> Mapping[str, int]:
        return {
            k: n
            for k, n in load_plan(run_directory(str(self.folder / "things.lance"), report.run_id)).counts.items()
            if n
        }


def open_shop(folder: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Three files, 18 records, not embedded yet."""
    made = Shop(folder, encoder)

    def here(catalog, plan, numbers, attempt):  # type: ignore[no-untyped-def]  # stands in for the pool of actors
        stager = Stager(Order(catalog, plan.run_id, attempt.version, attempt.left))
        for number in numbers:
            made.staging = True  # gates embed too
            record = stager.stage(number)
            made.staging = False
            yield {"rows": record.planned, "quarantined": record.quarantined}

    whole = embedder.Embedder.embed_decoded

    def counted(self, modality, decoded, size):  # type: ignore[no-untyped-def]
        if made.staging:
            made.embedded.append((modality, size))
        return whole(self, modality, decoded, size)

    for name in ("_run_units", "_run_here"):
        monkeypatch.setattr(embed, name, here)
    monkeypatch.setattr(embedder.Embedder, "embed_decoded", counted)
    made.write(a=[row(n) for n in range(8)], b=[row(n) for n in range(8, 14)], c=[row(n) for n in range(14, 18)])
    return made
