"""Numbers in sentences."""

from collections import Counter
from pathlib import Path

import pytest

from inversion_dpo.data.masks import odd_masks_text
from inversion_dpo.data.traits import oddities_text
from inversion_dpo.evaluation.report import check_evaluated
from inversion_dpo.run.config import ConfigError, load_config, to_yaml
from inversion_dpo.run.words import counted, seen, typed


def test_one_is_singular():
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert [counted(n, "person is", "people are") for n in (1, 2)] == [
        "1 person is",
        "2 people are",
    ]


def test_a_new_emoji_is_text_and_a_blank_of_no_width_is_none():
    texts = " a\u200bstar\n", " \u200b\x07\u2028", "\U0001fae9", "\ue000"
    assert [seen(t) for t in texts] == ["a star", "", "\U0001fae9", "\ue000"]


def test_a_single_odd_row_is_told_in_the_singular():
    one, two = (Counter(mask_whole=n, mask_grey=n, alike=n) for n in (1, 2))
    told = [*odd_masks_text(one), *oddities_text(one)]
    assert [text.split()[:3] for text in told] == [
        ["1", "mask", "counts"],
        ["1", "mask", "is"],
        ["1", "pair", "has"],
    ]
    told = [*odd_masks_text(two), *oddities_text(two)]
    assert [text.split()[1] for text in told] == ["masks", "masks", "pairs"]


def test_a_command_that_is_shown_can_be_typed(tmp_path):
    """A folder with a blank, or with a sign that the shell reads, is quoted."""
    plain, odd = Path("runs/mine"), Path("my runs/<b> $HOME")
    assert (typed(plain), typed(odd)) == ("runs/mine", "'my runs/<b> $HOME'")
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(load_config("taste", [])))
    with pytest.raises(ConfigError, match=f"run `inversion-dpo evaluate '{run}'`"):
        check_evaluated(run)
