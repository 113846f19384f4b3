"""Numbers and commands in sentences."""

from shlex import quote
from unicodedata import category

UNSEEN = ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")  # controls, no width, half characters, blanks


def counted(count: int, one: str, many: str = "") -> str:
    """Write a number with what it counts, singular or plural.

    >>> counted(1, "row"), counted(2, "row"), counted(0, "mask is grey", "masks are grey")
    ('1 row', '2 rows', '0 masks are grey')

    Args:
        count: of the things.
        one: the words for one.
        many: the words for none or several; by default those for one and an s.
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def harmless(text: str) -> str:
    r"""Write what a terminal would take for a command, such as a change of colour, as an escape.

    >>> harmless("a\x1b[31m star")
    'a\\x1b[31m star'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def seen(text: str) -> str:
    r"""Leave of a text what people can see, with blanks between.

    A character that this Python does not know yet, such as a new emoji, counts as seen.

    >>> seen("a\u200bstar\n"), seen(" \u200b\x07")
    ('a star', '')
    """
    return "".join(" " if category(c) in UNSEEN else c for c in text).strip()


def typed(path: object) -> str:
    """Write a path as a shell takes it in a command that is shown: quoted if need be."""
    return quote(str(path))
