"""`conjoin import` and `conjoin export`: folders in and out, on a disk and in a bucket, and the card beside them."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as library
import yaml
from PIL import Image

from conjoin.encoders import checkpoint
from conjoin.encoders.imported import import_encoder as read
from conjoin.encoders.joint import build
from conjoin.encoders.options import TowerOptions
from conjoin.encoders.transforms import fit_image
from conjoin.jobs.cli import main
from conjoin.pipeline import storage
from conjoin.pipeline.card import Facts, card
from conjoin.pipeline.embedder import load
from conjoin.pipeline.errors import ConfigError, EncoderError
from conjoin.pipeline.exchange import export_encoder, import_encoder


def front_matter(text: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(text.split("---\n")[1])
    return found


def run_folder(checkpoints: Path, place: Path) -> str:
    """A text tower and a picture tower as a training run leaves them; the encoder's folder."""
    options = {"text": TowerOptions(str(checkpoints / "bert")), "image": TowerOptions(size_px=16, width=8)}
    fingerprint = checkpoint.save(build({**options}, 8), place / "best", {"step": 40})
    towers = {"text": {"model": "shop/bert"}, "image": {"model": "builtin"}}
    recipe = {"towers": towers, "loss": "infonce", "global_batch_size": 64, "lr": 5e-4, "where": None}
    source = {"path": "s3://shop/clicks/", "id": "id", "text": "{title} | {brand}", "image": "picture"}
    storage.write_json(str(place / "train.json"), {"source": source, "recipe": recipe, "files": []})
    report = {"fingerprint": fingerprint, "rows": 1434, "steps": 40, "metrics": {"text_image_hit@10": 0.53125}}
    storage.write_json(str(place / "report.json"), report)
    return str(place / "best")


def test_an_imported_encoder_is_the_checkpoint_and_says_where_it_came_from(checkpoints: Path, tmp_path: Path) -> None:
    source, place = str(checkpoints / "clip"), str(tmp_path / "encoder")
    fingerprint = import_encoder(source, place)
    assert fingerprint == load(place).fingerprint == checkpoint.fingerprint(read(source))
    assert storage.read_json(f"{place}/spec.json")["metadata"] == {"imported_from": source}
    with pytest.raises(ConfigError, match="something in the folder already"):
        import_encoder(source, place)
    with pytest.raises(EncoderError, match=r"cannot be imported.*backbone, not an encoder"):
        import_encoder(str(checkpoints / "bert"), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_from_bucket_to_bucket(checkpoints: Path, tmp_path: Path, s3: str) -> None:
    storage.copy_tree(str(checkpoints / "clip"), f"{s3}/clip")
    fingerprint = import_encoder(f"{s3}/clip", f"{s3}/encoder")
    assert export_encoder(f"{s3}/encoder", f"{s3}/out") == "CLIPModel"
    storage.copy_tree(f"{s3}/out", str(tmp_path / "out"))
    assert fingerprint in (tmp_path / "out" / "README.md").read_text()
    library.CLIPModel.from_pretrained(tmp_path / "out")


def test_the_card_of_a_trained_encoder(checkpoints: Path, tmp_path: Path) -> None:
    encoder = run_folder(checkpoints, tmp_path / "shop-1f2e3d4c")
    assert export_encoder(encoder, str(tmp_path / "out"), "sentence-transformers") == "SentenceTransformer"
    text = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(text)["library_name"] == "sentence-transformers"
    assert front_matter(text)["base_model"] == ["shop/bert"]
    for said in (
        "# shop-1f2e3d4c\n",
        load(encoder).fingerprint,
        "| source | `s3://shop/clicks/` |",
        "| columns | text: {title} \\| {brand}, image: picture |",
        "| rows trained on | 1,434 |",
        "| lr | 0.0005 |",
        "| text_image_hit@10 | 0.5312 |",
        "| text | shop/bert | 20 tokens | linear |",
        "SentenceTransformer(",
        "holds its text tower",
    ):
        assert said in text, said
    assert "| where |" not in text
    assert "| image |" not in text


def test_a_report_of_other_weights_is_not_believed(checkpoints: Path, tmp_path: Path) -> None:
    encoder = run_folder(checkpoints, tmp_path / "run")
    report = storage.read_json(str(tmp_path / "run" / "report.json"))
    storage.write_json(str(tmp_path / "run" / "report.json"), {**report, "fingerprint": "0" * 32})
    export_encoder(encoder, str(tmp_path / "out"), "sentence-transformers")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\n")
    assert "# best\n" in text
    assert "hit@10" not in text
    assert "s3://shop" not in text


def test_what_a_card_says_of_a_sigmoids_bias(checkpoints: Path) -> None:
    spec = replace(read(str(checkpoints / "clip")).spec, loss="sigmoid")
    text = card(Facts("x", "0" * 32, spec, "CLIPModel", origin="openai/clip", bias=-9.5))
    assert "its bias, -9.5, has no place in CLIPModel" in text
    assert front_matter(text)["base_model"] == ["openai/clip"]


def test_a_table_and_a_full_folder_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this is a table"):
        export_encoder(str(tmp_path / "things.lance"), str(tmp_path / "out"))
    encoder = run_folder(checkpoints, tmp_path / "run")
    with pytest.raises(ConfigError, match="something in the folder already"):
        export_encoder(encoder, encoder)
    with pytest.raises(EncoderError, match="cannot be exported: the image tower is built in"):
        export_encoder(encoder, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_as_commands(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def conjoin(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["conjoin", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoints / "clip", "clip")
    code, out, _ = conjoin("import", "clip", "encoder", "--json")
    assert (code, json.loads(out)["modalities"], json.loads(out)["dim"]) == (0, ["image", "text"], 12)
    code, out, err = conjoin("export", "encoder", "--to", "out", "--as", "transformers")
    assert (code, out, err) == (0, "out\n", "load it with CLIPModel; README.md says how\n")
    code, out, err = conjoin("export", "encoder", "--to", "text", "--as", "sentence-transformers")
    assert (code, out) == (1, "")
    assert err.startswith("conjoin: cannot be exported: the text tower is half of a clip_text_model checkpoint")
    assert conjoin("export", "encoder", "--to", "x", "--as", "onnx")[0] == 2
    assert conjoin("import", "none-such-folder/", "y")[0] == 1


@pytest.mark.parametrize("name", ["clip", "siglip", "clap"])
def test_the_card_of_an_imported_pair_and_the_code_on_it(checkpoints: Path, tmp_path: Path, name: str) -> None:
    import_encoder(str(checkpoints / name), str(tmp_path / "encoder"))
    loads_as = export_encoder(str(tmp_path / "encoder"), str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert loads_as == {"clip": "CLIPModel", "siglip": "SiglipModel", "clap": "ClapModel"}[name]
    assert f"imported from `{checkpoints / name}`" in text
    assert ("base_model" in front_matter(text), "## Data" in text) == (False, False)
    code = text.split("```python\n")[1].split("```")[0]
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 61, 3), dtype=np.uint8))
    wave = rng.standard_normal(20_000).astype(np.float32) * 0.1
    found: dict[str, Any] = {"picture": picture, "wave": wave}
    exec(code.replace("path/to/this/folder", str(tmp_path / "out")), found)
    encoder = load(str(tmp_path / "encoder"), device="cpu").encoder
    transform: Any = encoder.spec.towers["audio" if name == "clap" else "image"].transform
    values: dict[str, Any] = {"text": "rain on a roof" if name == "clap" else "red sneakers"}
    values |= {"audio": wave} if name == "clap" else {"image": fit_image(picture, transform)}
    for modality, value in values.items():
        ours = encoder.encode(modality, encoder.collate(modality, [value]))
        theirs = torch.nn.functional.normalize(found[modality].pooler_output, dim=-1)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
