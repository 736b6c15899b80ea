"""Results as one self-contained HTML page with pictures; computes nothing.

Assumes: every text is escaped by the template; pictures are embedded as data URIs, so the page needs no network.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Picture:
    """image: encoded bytes (WebP, PNG or JPEG), or None; note: one short line below the caption."""

    caption: str
    image: bytes | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One query and what it found, best first; seconds is the time of the whole query."""

    title: str
    sql: str
    pictures: Sequence[Picture]
    seconds: float


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of figures; the first column names the row; note says how the figures came about."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """title and lead first, then headline figures (value, label), answers and grids."""

    title: str
    lead: str
    figures: Sequence[tuple[str, str]]
    answers: Sequence[Answer]
    grids: Sequence[Grid]
    commands: Sequence[str] = ()


def render(page: Page) -> str:
    """The page as HTML text."""
    parts = [
        f"<header><h1>{_text(page.title)}</h1><p class=lead>{_text(page.lead)}</p>{_figures(page.figures)}</header>",
        "".join(_answer(answer) for answer in page.answers),
        "".join(_grid(grid) for grid in page.grids),
        _commands(page.commands),
    ]
    style = (Path(__file__).parent / "report.css").read_text(encoding="ascii")
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{_text(page.title)}</title>"
    body = f"<body><main>{''.join(parts)}</main></body>"
    return f"<!doctype html><html lang=en><head>{head}<style>{style}</style></head>{body}</html>\n"


def data_uri(image: bytes) -> str:
    """Encoded picture bytes as a data URI, its type told by the first bytes."""
    kind = "webp" if image[8:12] == b"WEBP" else "png" if image[:4] == b"\x89PNG" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _figures(figures: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<div><b>{_text(value)}</b><span>{_text(label)}</span></div>" for value, label in figures)
    return f"<div class=figures>{cells}</div>"


def _answer(answer: Answer) -> str:
    pictures = "".join(_picture(picture) for picture in answer.pictures)
    return (
        f"<section><h2>{_text(answer.title)}<small>{answer.seconds * 1000:.0f} ms</small></h2>"
        f"<pre>{_text(answer.sql)}</pre><div class=strip>{pictures or '<p>no rows</p>'}</div></section>"
    )


def _picture(picture: Picture) -> str:
    shown = f"<img alt='{_text(picture.caption)}' src='{data_uri(picture.image)}'>" if picture.image else "<i></i>"
    return (
        f"<figure>{shown}<figcaption>{_text(picture.caption)}<small>{_text(picture.note)}</small></figcaption></figure>"
    )


def _grid(grid: Grid) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in grid.header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    note = f"<p class=note>{_text(grid.note)}</p>" if grid.note else ""
    table = f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    return f"<section><h2>{_text(grid.title)}</h2>{table}{note}</section>"


def _commands(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    return f"<section><h2>Go on from here</h2><pre>{_text(chr(10).join(commands))}</pre></section>"
