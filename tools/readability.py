"""Measure how readable README and docs are: ``python -m tools.readability [--check] [FILE ...]``.

For each page: sentences, the share of them over 25 words, and the longest. ``--check`` exits with 1
if, in a page or over all of them, more than 5% of the sentences have over 25 words, or if one

- has over 40 words, in running text or in a cell of a table;
- begins with "Of ", or contains ", of which";
- is a heading of over 15 words.

Every text counts: list items, quotes, admonitions, captions of pictures, HTML, and fenced blocks
without a programming language. Nothing of three words or fewer counts as a sentence, so that
fragments cannot thin the long ones out, and a semicolon ends no sentence.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXCLUDED = ("diary.md",)  # beside CHANGELOG.md: one dates from the day, the other is a list
LONG, LIMIT, SHARE, HEADING, FRAGMENT = 25, 40, 0.05, 15, 3
LANGUAGES = ("bash", "python", "yaml", "json", "text")
ABBREVIATIONS = ("e.g.", "i.e.", "cf.", "vs.", "al.", "Fig.", "approx.")
END = re.compile(r"[.!?…][\"')\]*_`”]*$")


@dataclass
class Page:
    """What one page holds: its sentences, and what is wrong whatever their share."""

    name: str
    sentences: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def long(self) -> list[str]:
        """The sentences over 25 words."""
        return [s for s in self.sentences if words(s) > LONG]

    @property
    def share(self) -> float:
        """Which part of the sentences is long; 0 of a page without any."""
        return len(self.long) / max(len(self.sentences), 1)


def words(text: str) -> int:
    """Count what is separated by white space and holds a letter or a digit."""
    return sum(any(c.isalnum() for c in word) for word in text.split())


def plain(text: str) -> str:
    """Return the text a reader sees: without the marks and addresses of Markdown and HTML."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<https?://[^>]*>", "", text)
    text = re.sub(r"</?[a-zA-Z][^>]*>", " ", text)
    return re.sub(r"(?<!\w)_(?=\w)|(?<=\w)_(?!\w)|[*`]", "", text)


def sentences(text: str) -> list[str]:
    """Split one block of text; a sentence ends at . ! or ? before a capital, a digit or a mark."""
    found: list[str] = []
    current: list[str] = []
    tokens = text.split()
    for i, here in enumerate(tokens):
        current.append(here)
        begins = i + 1 == len(tokens) or not tokens[i + 1][0].islower()
        if END.search(here) and begins and here.lstrip("(") not in ABBREVIATIONS:
            found.append(" ".join(current))
            current = []
    if current:
        found.append(" ".join(current))
    return [s for s in found if words(s) > FRAGMENT]


def blocks(text: str) -> list[tuple[str, str]]:
    """Cut a page into blocks, each ("text", "cell" or "heading", its content).

    A code block in a language is left out; any other is text, a line a block.
    """
    out: list[tuple[str, str]] = []
    paragraph: list[str] = []
    fence: str | None = None

    def close() -> None:
        if paragraph:
            out.append(("text", " ".join(paragraph)))
            paragraph.clear()

    for line in re.sub(r"<!--.*?-->", "", text, flags=re.S).splitlines():
        bare = line.strip()
        if re.match(r"(```|~~~)", bare):
            close()
            fence = None if fence is not None else bare[3:].strip()
        elif fence is not None:
            if fence.split(" ")[0] not in LANGUAGES or fence == "text" and END.search(bare):
                out.append(("text", bare))
        elif bare.startswith("|"):
            close()
            out += [("cell", cell) for cell in re.split(r"(?<!\\)\|", bare)[1:-1]]
        elif bare.startswith("#"):
            close()
            out.append(("heading", bare.lstrip("# ")))
        elif not bare or bare.startswith(("!!!", "???", ":::")):
            close()
        else:
            item = re.match(r"(?:[-*+]|\d+[.)]|>)\s+(.*)", bare)
            if item:
                close()
            paragraph.append(item[1] if item else bare)
    close()
    return [(kind, plain(content)) for kind, content in out]


def measure(name: str, text: str) -> Page:
    """Read one page."""
    page = Page(name)
    for kind, content in blocks(text):
        if kind == "heading":
            if words(content) > HEADING:
                page.faults.append(f"heading of {words(content)} words: {content}")
            continue
        if kind == "cell" and words(content) > LIMIT:
            page.faults.append(f"cell of {words(content)} words: {content}")
        found = sentences(content)
        if kind == "text":
            page.sentences += found
            page.faults += [f"{words(s)} words: {s}" for s in found if words(s) > LIMIT]
        page.faults += [f'begins with "Of": {s}' for s in found if s.startswith("Of ")]
        page.faults += [f'", of which": {s}' for s in found if ", of which" in s]
    return page


def pages() -> list[Path]:
    """List README, CONTRIBUTING and every page of docs but the diary."""
    docs = sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in EXCLUDED)
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *docs]


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each page and one for all; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a limit is passed")
    asked = parser.parse_args(arguments)
    read = [
        measure(os.path.relpath(p, ROOT), p.read_text(encoding="utf-8"))
        for p in asked.files or pages()
    ]
    whole = Page("all", [s for p in read for s in p.sentences])
    bad = False
    for page in [*read, whole]:
        longest = max(map(words, page.sentences), default=0)
        count = f"{page.share:6.1%} of {len(page.sentences):4d} long"
        print(f"{count}, longest {longest:3d}  {page.name}")
        over = page.share > SHARE
        bad = bad or over or bool(page.faults)
        shown = [f"{words(s)} words: {s}" for s in page.long] if over and page is not whole else []
        for fault in sorted({*shown, *page.faults}):
            print(f"        {fault}")
    return int(bad and asked.check)


if __name__ == "__main__":
    sys.exit(main())
