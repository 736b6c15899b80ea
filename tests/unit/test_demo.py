"""The demo's protocol: nothing that is scored was trained on."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from conjoin.jobs import demo
from conjoin.pipeline.errors import ConfigError
from conjoin.pipeline.query.parse import parse


def test_no_score_is_taken_on_what_was_trained(emoji: Path) -> None:
    rows = pq.read_table(emoji, columns=["caption", "category", "vendor"])
    frame = rows.append_column("part", demo._parts(rows)).to_pandas()
    parts = dict(list(frame.groupby("part")))
    assert len(frame) == 6_639
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 3_852,
        "seen": 1_370,
        "unseen": 300,
        "rest": 1_117,
    }
    assert set(parts["train"]["vendor"]) == {"noto", "noto-v1", "fluent-emoji-flat", "fxemoji"}
    assert set(parts["seen"]["vendor"]) | set(parts["unseen"]["vendor"]) == {"twemoji"}
    assert not set(parts["unseen"]["caption"]) & set(parts["train"]["caption"])
    assert parts["unseen"]["caption"].is_unique
    assert "flags" not in set(parts["train"]["category"]) | set(parts["seen"]["category"]) | set(
        parts["unseen"]["category"]
    )


def test_the_parts_are_the_same_every_time(emoji: Path) -> None:
    rows = pq.read_table(emoji, columns=["caption", "category", "vendor"])
    assert demo._parts(rows).equals(demo._parts(rows))


@pytest.mark.parametrize("from_scratch", [False, True])
def test_the_run_file_is_one_that_conjoin_reads(tmp_path: Path, from_scratch: bool) -> None:
    from conjoin.jobs.config import load

    file = tmp_path / "conjoin.yaml"
    demo._write_run_file(file, tmp_path, from_scratch, encoder=None)
    assert load(file).encoder is None
    demo._write_run_file(file, tmp_path, from_scratch, encoder="somewhere/best")
    config = load(file)
    assert config.encoder == "somewhere/best"
    assert set(config.train.towers) == {"image", "text"}
    assert (config.train.towers["text"].model == "builtin") == from_scratch


def test_there_are_eight_questions_that_parse() -> None:
    assert len(demo.QUESTIONS) == 8
    for question in demo.QUESTIONS:
        parse(question.sql)


def test_missing_towers_are_named_with_the_way_out(emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_WHEELS", ("no_such_wheel",))
    with pytest.raises(ConfigError, match="no_such_wheel") as caught:
        demo._require(emoji, from_scratch=False)
    assert "--from-scratch" in str(caught.value)
    demo._require(emoji, from_scratch=True)
    with pytest.raises(ConfigError, match="pictures are missing"):
        demo._require(emoji.with_name("none.parquet"), from_scratch=True)
