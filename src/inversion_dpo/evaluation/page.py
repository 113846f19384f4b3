"""Write a self-contained HTML page: the form of the reports of runs and of comparisons."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from inversion_dpo.data.images import data_uri, png
from inversion_dpo.evaluation.figures import Pixels, thumbnail
from inversion_dpo.run.disk import atomic_text

_SIDE = 320  # longest edge of an inlined image, pixels


@dataclass(frozen=True)
class Table:
    """Cells under a head.

    numbers: the columns that are right-aligned. strong: how many first rows are bold.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: range = range(0)
    strong: int = 0

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, str]], **looks: Any) -> Table | None:
        """Make a table from rows by column; None without rows."""
        return cls(list(rows[0]), [list(row.values()) for row in rows], **looks) if rows else None

    def markdown(self) -> str:
        """Write the table as Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


@dataclass(frozen=True)
class Picture:
    """An inlined image with its name and, if it has one, its score; one of them may be bold."""

    name: str
    image: str
    score: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two on how to read the section, and its contents.

    cards: a caption and the pictures above it, two or more. plates: figures, PNG bytes. panels:
    title, note and PNG bytes of small figures.
    """

    heading: str
    note: str
    table: Table | None = None
    cards: Sequence[tuple[str, Sequence[Picture]]] = ()
    plates: Sequence[bytes] = ()
    panels: Sequence[tuple[str, str, bytes]] = ()


@dataclass(frozen=True)
class Page:
    """The contents of a page; empty parts are left out.

    statements: verdict and sentence each. tiles: label, number and small print. closing: the last
    heading, over the resolved ``config`` and ``facts``, small tables under headings of their own.
    """

    eyebrow: str
    title: str
    sections: Sequence[Section]
    lede: str = ""
    statements: Sequence[tuple[str, str]] = ()
    tiles: Sequence[tuple[str, str, str]] = ()
    closing: str = "Settings"
    config: str = ""
    facts: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()

    def write(self, path: Path) -> Path:
        """Write the page, which needs no other file and no network; return its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_text(environment().get_template("page.html.jinja").render(page=self), path)
        return path


def inlined(image: Pixels) -> str:
    """Encode uint8 [H, W, 3] as a ``data:`` URL, its longest edge near 320 pixels."""
    return data_uri(png(thumbnail(image, _SIDE)))


def inline_text(text: str) -> Markup:
    """Escape text; mark code in backticks, write real minus signs, keep [intervals] on one line."""
    signed = re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", str(escape(text)))
    coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", signed)
    return Markup(re.sub(r"\[[^\[\]]{1,40}\]", r'<span class="whole">\g<0></span>', coded))


def reading(verdict: str, words: str) -> Markup:
    """Colour a verdict's words and put its mark before them."""
    return Markup('<span class="{0}"><span class="mark {0}"></span> {1}</span>').format(
        verdict, words
    )


def environment() -> Environment:
    """Load the templates beside this file; all text is escaped."""
    templates = Environment(
        loader=PackageLoader("inversion_dpo.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"inline": inline_text, "data_uri": data_uri}
    return templates
