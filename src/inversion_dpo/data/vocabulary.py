"""The words in which people write a thumb, or a choice between two images."""

from __future__ import annotations

from collections.abc import Sequence

from inversion_dpo.data.columns import Table, plain
from inversion_dpo.data.images import DataError

# Words for a thumb, as cells of a table and as names of two folders.
UPS = ("up", "ups", "thumbs_up", "thumbsup", "like", "liked", "likes", "good", "yes", "👍")
DOWNS = (
    *("down", "downs", "thumbs_down", "thumbsdown", "dislike", "disliked", "dislikes"),
    *("bad", "no", "👎"),
)
# Words for a choice between two images; the table's own names of the two come first.
FIRST = ("left", "a", "first", "image_0", "image_a", "model_a", "0_(left)")
SECOND = ("right", "b", "second", "image_1", "image_b", "model_b", "1_(right)")
TIE = ("tie", "equal", "same", "both", "both_good", "draw")
NEITHER = ("", "none", "neither", "both_bad", "tie_(bothbad)", "bad", "skip", "skipped")


def choice_of(said: object, table: Table, sides: Sequence[object]) -> float | None:
    """Read a choice between two images in words, or as the name of one.

    Args:
        said: the cell.
        table: its columns' names are words, too.
        sides: the cells of both images.

    Returns:
        1 for the first, 0 for the second, 0.5 for a tie, None for neither.

    Raises:
        DataError: no such word; the row is not named.
    """
    if said in sides and isinstance(said, str) and said:
        return 1.0 - sides.index(said)
    word = plain("" if said is None else str(said))
    own = [plain(table.names[name]) for name in ("jpg_0", "jpg_1")]
    known = {word: None for word in NEITHER} | dict.fromkeys(TIE, 0.5)
    known |= dict.fromkeys(FIRST, 1.0) | dict.fromkeys(SECOND, 0.0)
    known |= {own[0]: 1.0, own[1]: 0.0}
    if word not in known:
        raise DataError(
            f"{table.names['choice']} is {said!r:.60}; write left, right, tie or neither, or the "
            "name of the image. Of numbers some tools count from 0, some from 1: as label_0, 1 "
            "means the first image"
        )
    return known[word]
