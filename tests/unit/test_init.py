"""`conjoin init` writes a run file that conjoin reads."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.jobs.config import load
from conjoin.jobs.init import write_run_file
from conjoin.pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("file", "name"),
    [("emoji.parquet", "emoji"), ("2024 shop, all: new.parquet", "t_2024_shop_all_new"), ("yes.parquet", "yes")],
)
def test_what_is_written_is_read(tmp_path: Path, emoji: Path, file: str, name: str) -> None:
    data = tmp_path / file
    data.symlink_to(emoji)
    lines = write_run_file(str(data), tmp_path / "conjoin.yaml", None, False)
    config = load(tmp_path / "conjoin.yaml")
    assert (config.name, config.source.path) == (name, str(data))
    assert (config.source.id, config.source.image, config.source.text) == ("id", "image", "caption")
    assert config.table.path == f"vectors/{name}.lance"
    assert set(config.train.towers) == {"image", "text"}
    assert "image: image  (its bytes begin like one)" in lines
    assert "# its bytes begin like one" in (tmp_path / "conjoin.yaml").read_text()


def test_columns_with_odd_names(tmp_path: Path) -> None:
    columns = {"my id": ["a", "b"], "caption: {long}": ["x", "y"], "#n": [1, 1]}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    write_run_file(str(tmp_path / "d.parquet"), tmp_path / "c.yaml", "odd", False)
    source = load(tmp_path / "c.yaml").source
    assert (source.id, list(source.keep)) == ("my id", ["caption: {long}", "#n"])


def test_an_example_without_data(tmp_path: Path) -> None:
    write_run_file(None, tmp_path / "new" / "conjoin.yaml", None, False)
    config = load(tmp_path / "new" / "conjoin.yaml")
    assert (config.name, config.source.text) == ("catalog", "{title}. {brand}")


def test_commented_sections_are_valid_when_uncommented(tmp_path: Path) -> None:
    write_run_file(None, tmp_path / "c.yaml", None, False)
    lines = (tmp_path / "c.yaml").read_text().splitlines()
    opened = [
        line.replace("# ", "", 1) if line.startswith(("# embed", "# gates", "# limits")) else line for line in lines
    ]
    assert opened != lines
    (tmp_path / "c.yaml").write_text("\n".join(opened))
    assert load(tmp_path / "c.yaml").name == "catalog"


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "c.yaml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="--force"):
        write_run_file(None, out, None, False)
    assert out.read_text() == "mine"
    write_run_file(None, out, None, True)
    assert load(out).name == "catalog"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the run file"):
        write_run_file(None, tmp_path / "file" / "c.yaml", None, False)
