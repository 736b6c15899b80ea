"""Bad input at the command line: one sentence on stderr, nothing on stdout, exit 1 for the data, 2 for the run file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from conjoin.jobs.cli import main

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run_file(tmp_path: Path, small_encoder: Path) -> Path:
    pq.write_table(pa.table({"id": ["a", "a"], "caption": ["x", "y"]}), tmp_path / "rows.parquet")
    fields = {
        "name": "things",
        "source": {"path": str(tmp_path / "rows.parquet"), "id": "id", "text": "caption"},
        "encoder": str(small_encoder),
        "table": {"path": str(tmp_path / "things.lance")},
    }
    (tmp_path / "conjoin.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "conjoin.yaml"


@pytest.fixture
def conjoin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: exit code and stderr; stdout must be empty."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["conjoin", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert out == ""
        assert isinstance(caught.value.code, int)
        return caught.value.code, err

    return run


def sentence(err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("conjoin: ")
    return lines[0].removeprefix("conjoin: ")


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_missing_source(conjoin: Run, run_file: Path, command: str) -> None:
    missing = run_file.parent / "gone.parquet"
    code, err = conjoin(command, str(run_file), "--set", f"source.path={missing}")
    assert code == 1
    assert sentence(err) == f"no such file or directory [{missing}]. Correct source.path in the run file"


def test_a_missing_column(conjoin: Run, run_file: Path) -> None:
    code, err = conjoin("check", str(run_file), "--set", "source.text=captoin")
    assert code == 1
    assert sentence(err) == (
        f"source.text: no column 'captoin' [{run_file.parent}/rows.parquet]. Did you mean 'caption'?"
    )


def test_repeated_ids_stop_the_night_before_anything_is_written(conjoin: Run, run_file: Path) -> None:
    code, err = conjoin("run", str(run_file))
    assert code == 1
    said = [line for line in err.splitlines() if not line.startswith("plan: ")]  # how far it was
    assert "1 id(s) of column 'id' occur more than once: 'a': " in sentence("\n".join(said))
    assert {path.name for path in run_file.parent.iterdir()} == {"rows.parquet", "conjoin.yaml"}


def test_a_missing_encoder(conjoin: Run, run_file: Path) -> None:
    code, err = conjoin("run", str(run_file), "--set", "encoder=/nowhere")
    assert code == 1
    assert sentence(err).startswith("no encoder there (no spec.json) [/nowhere]. Train one with `conjoin train`")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("source.txt=caption", "source.txt: unknown key; did you mean 'text'?"),
        ("embed.max_bad_fraction=2", "embed.max_bad_fraction: input should be less than or equal to 1"),
        ("source.text={caption", "source.text: value error, source.text: '{caption' is not a template"),
    ],
)
def test_a_wrong_run_file(conjoin: Run, run_file: Path, setting: str, words: str) -> None:
    code, err = conjoin("check", str(run_file), "--set", setting)
    assert code == 2
    assert sentence(err).startswith(words)
    assert f"[{run_file}]" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [1,\nb: 2", "not valid YAML: "), ("- a", "a run file is a mapping"), (None, "a folder is no run file")],
)
def test_what_is_no_run_file(conjoin: Run, tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "conjoin.yaml"
    file.mkdir() if content is None else file.write_text(content)
    code, err = conjoin("check", str(file))
    assert code == 2
    assert sentence(err).startswith(words)
    assert f"[{file}]" in err


def test_a_run_file_cannot_be_made(conjoin: Run, run_file: Path) -> None:
    out = run_file.parent / "new.yaml"
    code, err = conjoin("init", str(run_file), "--out", str(out))
    assert code == 1
    assert sentence(err).startswith("not a readable Parquet file: ")
    assert f"[{run_file}]" in err
    code, err = conjoin("init", str(run_file.parent / "rows.parquet"), "--out", str(run_file / "below.yaml"))
    assert code == 2
    assert sentence(err).startswith("cannot write the run file: ")
    assert not out.exists()


def test_no_table_to_read(conjoin: Run, tmp_path: Path) -> None:
    table = str(tmp_path / "nothing.lance")
    code, err = conjoin("query", table, "SELECT * FROM nothing")
    assert code == 1
    assert sentence(err) == f"no table [{table}]. `conjoin run` makes it"


def test_the_installed_command_says_it_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from conjoin.jobs.cli import main; main()", "check", str(tmp_path / "x.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence(done.stderr) == f"no run file [{tmp_path}/x.yaml]. `conjoin init DATA` writes one"
