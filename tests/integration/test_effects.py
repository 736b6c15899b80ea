"""A night killed before and after each of its durable effects, without Ray: the same command goes on, nothing is lost.

A kill is an exception that nothing catches. It does not skip `finally` as SIGKILL does: test_kill.py has real ones.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from shop import DATE, Shop, open_shop, row

from conjoin.jobs.nightly import run
from conjoin.pipeline import storage, store

KEPT = ("things.lance", "things.conjoin", "things__quarantine.lance")


class Killed(BaseException):
    """Nothing of ours catches it."""


class Effects:
    """Every call that leaves something behind, by name in order; `dies` (number, after) kills at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lance import fragment

        self.names: list[str] = []
        self.dies: tuple[int, bool] | None = None
        tags = type(lance.write_dataset(pa.table({"a": [1]}), "memory://tags").tags)
        optimizer = type(lance.write_dataset(pa.table({"a": [1]}), "memory://optimize").optimize)
        dataset = lance.LanceDataset
        targets: list[tuple[object, str]] = [
            *((storage, name) for name in ("write_bytes", "create_bytes", "copy_tree", "remove")),
            *(
                (dataset, name)
                for name in (
                    "commit",
                    "add_columns",
                    "drop_columns",
                    "alter_columns",
                    "restore",
                    "update_schema_metadata",
                )
            ),
            *((dataset, name) for name in ("create_index", "create_scalar_index", "drop_index", "delete")),
            *((fragment, name) for name in ("write_fragments",)),
            *((fragment.LanceFragment, name) for name in ("update_columns", "delete_rows")),
            *((tags, name) for name in ("create", "update")),
            (optimizer, "optimize_indices"),
            (lance, "write_dataset"),
        ]
        for owner, name in targets:
            static = name == "commit"
            made = self._watched(name, getattr(owner, name))
            monkeypatch.setattr(owner, name, staticmethod(made) if static else made)

    def _watched(self, name: str, whole: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object, **kwargs: object) -> object:
            if threading.current_thread().name == "heartbeat":  # by the clock: a slow night has more of them
                return whole(*args, **kwargs)
            number = len(self.names)
            self.names.append(name)
            if self.dies == (number, False):
                raise Killed
            done = whole(*args, **kwargs)
            if self.dies == (number, True):
                raise Killed
            return done

        return watched

    def watch(self, action: Callable[[], object], dies: tuple[int, bool] | None = None) -> bool:
        """Whether the action was killed."""
        self.names, self.dies = [], dies
        try:
            action()
        except Killed:
            return True
        finally:
            self.dies = None
        return False


def changes(shop: Shop) -> None:
    """Something of every kind: new, changed, gone, moved, prices, unusable, a file less."""
    shop.write(
        a=[row(0, caption="green"), *(row(n) for n in range(2, 8)), row(100), row(101, picture=b"torn")],
        b=None,
        c=[*(row(n, price=0.5) for n in range(14, 18)), row(9), row(10, picture=b"torn")],
    )


def another_encoder(shop: Shop) -> None:
    from conjoin.encoders.checkpoint import save
    from conjoin.encoders.joint import build
    from conjoin.encoders.options import TowerOptions

    towers = {"text": TowerOptions(max_tokens=16, width=16), "image": TowerOptions(size_px=16, width=16)}
    save(build(towers, 8, ["blue car", "red apple"]), shop.folder / "other", {})
    shop.encoder = shop.folder / "other"
    shop.write(a=[row(0, caption="green"), *(row(n) for n in range(1, 8))])


class Backup:
    """The table and its bookkeeping as they were; the source stays where it is, since its etags are inodes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in KEPT:
            if (folder / name).exists():
                shutil.copytree(folder / name, folder / "backup" / name)

    def restore(self) -> None:
        for name in KEPT:
            shutil.rmtree(self._folder / name, ignore_errors=True)
            if (self._folder / "backup" / name).exists():
                shutil.copytree(self._folder / "backup" / name, self._folder / name)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("change", [changes, another_encoder], ids=["changes", "another-encoder"])
def test_a_kill_at_every_effect(
    change: Callable[[Shop], None], tmp_path: Path, small_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = open_shop(tmp_path, small_encoder, monkeypatch)
    shop.more = {"embed": {"unit_rows": 8, "max_bad_fraction": 1.0}, "upkeep": {"small_fragments": 2}}
    run(shop.config(), DATE)
    before, uri = shop.table(), str(tmp_path / "things.lance")
    change(shop)
    backup = Backup(tmp_path)
    effects = Effects(monkeypatch)
    assert not effects.watch(lambda: run(shop.config(), DATE))
    names, wanted = list(effects.names), shop.table()
    assert {"commit", "write_fragments", "update_columns", "update", "create_bytes"} <= set(names)
    for number, name in enumerate(names):
        for after in (False, True):
            backup.restore()
            assert effects.watch(lambda: run(shop.config(), DATE), (number, after)), (number, name)
            live = shop.table()
            assert live.equals(before) or live.equals(wanted), f"live is torn, killed at {number} {name}"
            run(shop.config(), DATE)
            found = shop.table()
            same = found.equals(wanted)
            assert same, f"another table, killed {'after' if after else 'before'} effect {number} {name} of {names}"
            assert store.head(uri).to_table().sort_by("id").equals(found)
