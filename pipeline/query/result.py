"""The answer of a query: an Arrow table that prints itself, shows its pictures in a notebook, and converts.

Assumes: what it holds came from a catalog and is not trusted: everything shown in HTML is escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from conjoin.pipeline.errors import QueryError

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

_SHOWN_ROWS = 50
_SHOWN_CHARS = 80
_PICTURES = ((b"RIFF", "image/webp"), (b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """Rows in the order of the query. versions: the version of every table that was read, by its name."""

    table: pa.Table
    versions: Mapping[str, int]

    def __post_init__(self) -> None:
        """A join may give one name twice; rows as dicts need them apart (id, id_1)."""
        names: list[str] = []
        for name in self.table.column_names:
            again = (f"{name}_{i}" for i in range(1, self.table.num_columns + 1))
            names.append(name if name not in names else next(other for other in again if other not in names))
        object.__setattr__(self, "table", self.table.rename_columns(names))

    def to_arrow(self) -> pa.Table:
        return self.table

    def to_pandas(self) -> pd.DataFrame:
        return self.table.to_pandas()

    def to_polars(self) -> pl.DataFrame:
        """Raises QueryError without polars."""
        try:
            import polars as pl
        except ImportError:
            raise QueryError("polars is not installed", next='pip install "conjoin[polars]"') from None
        frame = pl.from_arrow(self.table)
        assert isinstance(frame, pl.DataFrame)
        return frame

    def to_pylist(self) -> list[dict[str, object]]:
        return self.table.to_pylist()

    @property
    def columns(self) -> list[str]:
        return self.table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[dict[str, object]]:
        """One dict per row."""
        for batch in self.table.to_batches():
            yield from batch.to_pylist()

    def __repr__(self) -> str:
        rows = [
            self.columns,
            *([_text(v) for v in row.values()] for row in self.table.slice(0, _SHOWN_ROWS).to_pylist()),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, self._more()])

    def _more(self) -> str:
        more = f", {_SHOWN_ROWS} shown" if len(self) > _SHOWN_ROWS else ""
        return f"({len(self)} row{'' if len(self) == 1 else 's'}{more})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>"
            for row in self.table.slice(0, _SHOWN_ROWS).to_pylist()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(self._more())}</p>"


def _cell(value: object) -> str:
    if isinstance(value, bytes):
        kind = next((kind for magic, kind in _PICTURES if value.startswith(magic)), None)
        if kind:
            return f'<img src="data:{kind};base64,{base64.b64encode(value).decode()}" style="max-height:96px">'
    return html.escape(_text(value))


def _text(value: object) -> str:
    """One short line: vectors and bytes abbreviated, floats to six digits."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > 4 and all(isinstance(item, float) for item in value):
        return f"[{', '.join(f'{item:.3f}' for item in value[:3])}, ... {len(value)}]"
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."
