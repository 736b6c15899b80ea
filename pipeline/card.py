"""The model card of an exported encoder: README.md with front matter, filled from what is known of its making.

Assumes: only facts are written; what nobody recorded is left out. The licence is the publisher's to add.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from conjoin.encoders.spec import AudioTransform, EncoderSpec, ImageTransform, TextTransform, TowerSpec

Form = Literal["sentence-transformers", "transformers"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LOAD: Mapping[str, str] = {
    "SentenceTransformer": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{place}")
vectors = model.encode(["red sneakers"])
""",
    "CLIPModel": """from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("{place}"), AutoProcessor.from_pretrained("{place}")
text = model.get_text_features(**processor(text=["red sneakers"], padding=True, truncation=True, return_tensors="pt"))
image = model.get_image_features(**processor(images=[picture], return_tensors="pt"))
""",
    "SiglipModel": """from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("{place}"), AutoProcessor.from_pretrained("{place}")
words = processor(text=["red sneakers"], padding="max_length", truncation=True, return_tensors="pt")
text = model.get_text_features(**words)
image = model.get_image_features(**processor(images=[picture], return_tensors="pt"))
""",
    "ClapModel": """from transformers import AutoFeatureExtractor, AutoModel, AutoTokenizer

model, words = AutoModel.from_pretrained("{place}"), AutoTokenizer.from_pretrained("{place}")
text = model.get_text_features(**words(["rain on a roof"], padding=True, truncation=True, return_tensors="pt"))
sounds = AutoFeatureExtractor.from_pretrained("{place}")
audio = model.get_audio_features(**sounds(wave, sampling_rate={rate}, return_tensors="pt"))
""",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """train and report: of the training run, empty where there was none; origin: what an encoder was imported from.

    loads_as: the class of the other library; bias: of the sigmoid loss, where that class has no place for it.
    """

    name: str
    fingerprint: str
    spec: EncoderSpec
    loads_as: str
    origin: str = ""
    bias: float | None = None
    train: Mapping[str, object] = field(default_factory=dict)
    report: Mapping[str, object] = field(default_factory=dict)


def card(facts: Facts) -> str:
    """Markdown with YAML front matter."""
    sections = [
        _front_matter(facts),
        f"# {facts.name}\n\n{_about(facts)}",
        f"## How to load it\n\n```python\n{_load(facts)}```\n\n{_after_loading(facts)}",
        f"## Towers\n\n{_table(('modality', 'model', 'takes', 'head'), _towers(facts))}",
        _data(facts),
        _metrics(facts),
    ]
    return "\n\n".join(section.rstrip() for section in sections if section) + "\n"


def _front_matter(facts: Facts) -> str:
    text_only = facts.loads_as == "SentenceTransformer"
    fields: dict[str, str | list[str]] = {
        "library_name": "sentence-transformers" if text_only else "transformers",
        "tags": ["conjoin", "embeddings", *_shown(facts)],
    }
    if text_only or "image" in facts.spec.towers:
        fields["pipeline_tag"] = "sentence-similarity" if text_only else "zero-shot-image-classification"
    models = {_model(facts, name) for name in _shown(facts)} | {facts.origin}
    if bases := sorted(model for model in models if _HUB_NAME.fullmatch(model)):
        fields["base_model"] = bases
    # JSON strings and lists are YAML
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"])


def _about(facts: Facts) -> str:
    spec = facts.spec
    modalities = " and ".join(sorted(spec.towers))
    made = f"imported from `{facts.origin}`" if facts.origin else f"trained with the {spec.loss} loss"
    lines = [f"A joint encoder of {modalities} into {spec.dim} dimensions, {made}, written by conjoin."]
    if len(_shown(facts)) < len(spec.towers):
        lines.append(f"This folder holds its {' and '.join(_shown(facts))} tower; vectors of the others fit to it.")
    lines.append(f"Fingerprint of the encoder that gives the same vectors: `{facts.fingerprint}`.")
    return " ".join(lines)


def _load(facts: Facts) -> str:
    rate = next((tower.transform.sample_rate_hz for tower in facts.spec.towers.values() if _is_audio(tower)), 0)  # type: ignore[union-attr]  # _is_audio
    return _LOAD[facts.loads_as].format(place="path/to/this/folder", rate=rate)


def _after_loading(facts: Facts) -> str:
    if facts.loads_as == "SentenceTransformer":
        return "Vectors have unit length. Weights of a pooler reported as missing are not used."
    lines = ["Scale the `pooler_output` of both to unit length; their products are cosine similarities."]
    if any(tower.kind == "image" for tower in facts.spec.towers.values()):
        lines.append("conjoin lays transparent pictures on white first.")
    if facts.bias is not None:
        lines.append(f"Trained with the sigmoid loss; its bias, {facts.bias:g}, has no place in {facts.loads_as}.")
    return " ".join(lines)


def _towers(facts: Facts) -> list[tuple[str, ...]]:
    return [
        (name, _model(facts, name) or facts.origin or _class(tower), _takes(tower), tower.head)
        for name, tower in ((name, facts.spec.towers[name]) for name in _shown(facts))
    ]


def _shown(facts: Facts) -> list[str]:
    """Modalities whose towers the folder holds."""
    names = sorted(facts.spec.towers)
    return (
        names if facts.loads_as != "SentenceTransformer" else [n for n in names if facts.spec.towers[n].kind == "text"]
    )


def _class(tower: TowerSpec) -> str:
    return str(tower.config.get("class", tower.backbone)).rpartition(".")[2]


def _is_audio(tower: TowerSpec) -> bool:
    return isinstance(tower.transform, AudioTransform)


def _takes(tower: TowerSpec) -> str:
    transform = tower.transform
    if isinstance(transform, TextTransform):
        return f"{transform.max_tokens} tokens"
    if isinstance(transform, ImageTransform):
        return f"{transform.size_px} x {transform.size_px} px ({transform.fit})"
    return f"{transform.max_s:g} s at {transform.sample_rate_hz} Hz"


def _model(facts: Facts, modality: str) -> str:
    towers = _mapping(_mapping(facts.train.get("recipe")).get("towers"))
    return str(_mapping(towers.get(modality)).get("model") or "")


def _data(facts: Facts) -> str:
    if not facts.train:
        return ""
    source, recipe = _mapping(facts.train.get("source")), _mapping(facts.train.get("recipe"))
    columns = {name: source.get(name) for name in ("text", "image", "audio") if source.get(name)}
    rows = [("source", f"`{_text(source.get('path'))}`"), ("columns", _text(columns))]
    if "rows" in facts.report:
        rows += [("rows trained on", f"{facts.report['rows']:,}"), ("steps", f"{facts.report['steps']:,}")]
    rows += [
        (name, _text(recipe[name]))
        for name in ("where", "loss", "global_batch_size", "epochs", "lr", "seed")
        if recipe.get(name) is not None
    ]
    return f"## Data and recipe\n\n{_table(('what', 'value'), rows)}"


def _metrics(facts: Facts) -> str:
    found = _mapping(facts.report.get("metrics"))
    if not found:
        return ""
    rows = [(name, f"{value:.4f}") for name, value in sorted(found.items())]
    return f"## On the validation split\n\n{_table(('metric', 'value'), rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # a column may be named with a bar, which would end the cell
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _mapping(value: object) -> Mapping[str, object]:
    return cast(Mapping[str, object], value) if isinstance(value, Mapping) else {}
