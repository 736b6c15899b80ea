"""`conjoin init`: a commented run file whose columns are guessed from the data.

Assumes: a guess is shown with its reason, and the file is meant to be edited.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from conjoin.pipeline.errors import ConfigError

_EXAMPLE = {
    "source": {"path": "catalog/*.parquet", "id": "id", "image": "image", "text": "{title}. {brand}"},
    "why": {},
}
_REST = """
# encoder: encoders/{name}-.../best      # a folder that `conjoin train` made; nights and queries use it

table:
  path: {table}           # a plain Lance dataset: lancedb.connect("{folder}").open_table("{name}")
  # vector_dtype: auto        # float32 | float16, decided when the table is created
  # thumbnail_px: auto        # small pictures for people: auto is 96 where the source holds bytes; 0 is none
  # ann_recall: 0.99          # recall@10 that an approximate index must reach
  # full_text: [text]         # columns that bm25() and hybrid() search: text, or kept ones

# embed: {{precision: auto, max_bad_fraction: 0.001}}   # more quarantined rows than this stop the night
# gates: {{row_change: 0.05}}                           # what must hold before readers see a version
# limits: {{hours: 6, cost: 400}}                       # a plan above them does not start
# upkeep: {{keep_days: 30, keep_versions: 7}}           # `conjoin clean` shows what may go
# tables: {{orders: orders/*.parquet}}                  # further tables that SQL can join, by name

train:                        # a recipe: editing it never re-embeds anything
  output: encoders
  towers:                     # model: builtin | efficientnet-lite0 | package:NAME | a local directory | a hub name
{towers}
                              # tune: all | head | last:4 | lora
  dim: 256
  # loss: infonce             # infonce | sigmoid | triplet
  # same_group: mask          # records of one group: left out of each other's negatives | positive | negative
  # matryoshka: [128, 64]     # shorter prefixes of the vectors to train along
  global_batch_size: 512      # all workers together
  # micro_batch_size: auto    # of one forward pass; never changes the result
  epochs: 10
  lr: 5.0e-4
  # patience: 3               # stop after so many validations without a better hit@10
"""


def write_run_file(data: str | None, out: Path, name: str | None, force: bool) -> list[str]:
    """Writes `out`; returns lines that say what was guessed and why.

    Raises ConfigError if the file exists and `force` is not given, SourceError if the data cannot be read.
    """
    if out.exists() and not force:
        raise ConfigError("the run file exists", where=str(out), next="Pass --force to overwrite it, or --out")
    source, reasons = _guess(data)
    table_name = (
        name or re.sub(r"\W+", "_", Path(str(data or "catalog").split("*")[0].rstrip("/")).stem).strip("_") or "catalog"
    )
    if table_name[0].isdigit():
        table_name = f"t_{table_name}"
    text = yaml.safe_dump({"name": table_name}, sort_keys=False) + "\n" + _source_section(source, reasons)
    modalities = [key for key in ("image", "text", "audio") if key in source]
    towers = "\n".join(f"    {key}: {{model: builtin, tune: all}}" for key in modalities)
    text += _REST.format(name=table_name, table=f"vectors/{table_name}.lance", folder="vectors", towers=towers)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the run file: {error.strerror}", where=str(out), next="Pass --out") from error
    return [
        f"{key}: {value}  ({reasons[key]})" if key in reasons else f"{key}: {value}" for key, value in source.items()
    ]


def _guess(data: str | None) -> tuple[dict[str, object], dict[str, str]]:
    if data is None:
        return dict(_EXAMPLE["source"]), {}
    from conjoin.pipeline.guess import guess

    found = guess(data)
    return {"path": data, **found.columns}, dict(found.reasons)


def _source_section(source: dict[str, object], reasons: dict[str, str]) -> str:
    lines = ["source:"]
    for key, value in source.items():
        entry = yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=True, width=10**6).strip()[1:-1]
        lines.append(f"  {entry}" + (f"    # {reasons[key]}" if key in reasons else ""))
    if "group" not in source:
        lines.append(
            "  # group: style_id          # variants of one thing: never each other's negatives, never split apart"
        )
    lines.append("  # changed_by: updated_at     # a column that changes when the record does; default: content hashes")
    return "\n".join(lines) + "\n"
