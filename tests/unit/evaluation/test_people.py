"""People's win rate: counted by hand, written and read."""

import pytest

from inversion_dpo.evaluation.people import people_text, read_people, write_people

ABOUT = {"policy": "abc", "comparison": "f00", "guidance_scale": 7.5}


def test_ties_are_half_a_win_and_the_interval_is_wilsons(tmp_path):
    outcomes = {"first": 7, "second": 1, "tie": 1, "bad": 1, "split": 0, "unlabelled": 5}
    found = write_people(tmp_path, ABOUT, outcomes, 2)
    assert (found["wins"], found["losses"], found["even"], found["pairs"]) == (7, 1, 2, 10)
    assert found["win_rate"] == pytest.approx(0.8)
    # p = .8, n = 10, z = 1.96: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert (found["win_rate_low"], found["win_rate_high"]) == pytest.approx(
        (0.490, 0.943), abs=1e-3
    )
    assert read_people(tmp_path) == read_people(tmp_path, "abc") == found
    assert read_people(tmp_path, "another policy") is None
    assert people_text(found).startswith("2 people compared 10 pairs of pictures, at guidance")
    assert "better one in 80.0% [49.0, 94.3]; ties" in people_text(found)


def test_nobody_judged(tmp_path):
    assert read_people(tmp_path) is None
    write_people(tmp_path, ABOUT, {}, 0)
    assert read_people(tmp_path) is None
