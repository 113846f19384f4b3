"""Pairs by vote of scorers: who wins, how sure, and what a kill leaves."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from inversion_dpo.data.build import Labelled, build_scored_pairs, elect, preference
from inversion_dpo.data.candidates import Candidate
from inversion_dpo.data.images import DataError
from inversion_dpo.data.pairs import read_pairs


def made(seed, **scores):
    return Candidate("a", "", seed, b"jpg%d" % seed, scores)


def test_preference_by_hand():
    a, b = made(0, pickscore=21.5, clip=30.0, aesthetic=5.0), made(1, pickscore=21.0, clip=31.0,
                                                                   aesthetic=5.0)  # fmt: skip
    assert preference(a, b, ["clip"]) == 0 and preference(b, a, ["clip"]) == 1
    assert preference(a, b, ["aesthetic"]) == 0.5
    softmax = math.exp(21.5) / (math.exp(21.5) + math.exp(21.0))
    assert preference(a, b, ["pickscore"]) == pytest.approx(softmax)
    votes = preference(a, b, ["pickscore", "clip", "aesthetic"])
    assert votes == pytest.approx((softmax + 0 + 0.5) / 3)
    assert preference(b, a, ["pickscore", "clip", "aesthetic"]) == pytest.approx(1 - votes)


def test_hpsv2_and_imagereward_are_their_own_probabilities():
    a, b = made(0, hpsv2=0.28, imagereward=1.0), made(1, hpsv2=0.27, imagereward=0.0)
    assert preference(a, b, ["hpsv2"]) == pytest.approx(math.e / (1 + math.e))
    reward = 1.0333394966054072  # before normalisation
    assert preference(a, b, ["imagereward"]) == pytest.approx(1 / (1 + math.exp(-reward)))


def test_large_differences_do_not_overflow():
    a, b = made(0, pickscore=5000.0), made(1, pickscore=-5000.0)
    assert preference(a, b, ["pickscore"]) == 1 and preference(b, a, ["pickscore"]) == 0


def test_one_voter_pairs_highest_and_lowest():
    group = [made(k, s=v) for k, v in enumerate([3.0, 9.0, 1.0, 5.0])]
    (found,) = elect(group, ["s"])
    assert (found.winner.seed, found.loser.seed, found.preference) == (1, 2, 1.0)


def test_the_majority_wins_over_one_loud_voter():
    group = [made(0, a=1.0, b=1.0, c=0.0), made(1, a=0.0, b=0.0, c=1000.0)]
    (found,) = elect(group, ["a", "b", "c"])
    assert found == Labelled(group[0], group[1], 2 / 3)


def test_ties_are_no_pair():
    assert elect([made(0, s=1.0), made(1, s=1.0)], ["s"]) == []
    assert elect([made(0, a=1.0, b=0.0), made(1, a=0.0, b=1.0)], ["a", "b"]) == []
    assert elect([made(0, s=1.0)], ["s"]) == []


def test_several_pairs_come_from_both_ends():
    group = [made(k, s=v) for k, v in enumerate([3.0, 9.0, 1.0, 5.0, 4.0])]
    found = [(p.winner.seed, p.loser.seed) for p in elect(group, ["s"], 9)]
    assert found == [(1, 2), (3, 0)]  # the middle one has no partner
    tied = [made(k, s=v) for k, v in enumerate([9.0, 5.0, 5.0, 1.0])]
    assert [(p.winner.seed, p.loser.seed) for p in elect(tied, ["s"], 2)] == [(0, 3)]


def test_an_absent_voter_is_named():
    with pytest.raises(DataError, match="no score 'beauty' to vote by; there are s"):
        elect([made(0, s=1.0), made(1, s=2.0)], ["beauty"])


def draw(prompts, seeds):
    """Grey images that brighten with the seed."""
    return [np.full((16, 16, 3), 20 + 9 * (s % 25), np.uint8) for s in seeds]


def score(images, prompts):
    light = np.array([i.mean() for i in images])
    return {"light": light, "dark": -light, "light_too": light}


PROMPTS = [f"prompt {k}" for k in range(40)]


def test_the_file_is_read_as_pairs_and_keeps_the_soft_labels(tmp_path):
    count = build_scored_pairs(tmp_path, draw, score, PROMPTS, 3, 0)
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert count == len(rows) == 40 and {r["label_0"] for r in rows} == {0.0, 1.0}
    for row in rows:
        assert row["preference_0"] == pytest.approx(2 / 3 if row["label_0"] else 1 / 3)
        first, second = (json.loads(row[f"scores_{k}"])["light"] for k in (0, 1))
        assert (first > second) == bool(row["label_0"])
    found = read_pairs(tmp_path / "pairs.parquet")
    assert len(found.pairs) == 40 and [p.caption for p in found.pairs] == PROMPTS
    assert found.pairs[0].scene_graph is None


def test_least_agreement_and_limit(tmp_path):
    with pytest.raises(DataError, match="--least"):
        build_scored_pairs(tmp_path, draw, score, PROMPTS, 3, 0, least=0.7)
    assert build_scored_pairs(tmp_path, draw, score, PROMPTS, 3, 0, least=0.7, limit=5,
                              voters=["light", "light_too"]) == 5  # fmt: skip
    four = (tmp_path / "b", draw, score, PROMPTS[:4], 4, 0, ["light"])
    assert build_scored_pairs(*four, each=2) == 8
    assert build_scored_pairs(*four, limit=3, each=2) == 3


def test_a_kill_loses_one_chunk_and_changes_nothing(tmp_path):
    build_scored_pairs(tmp_path / "whole", draw, score, PROMPTS, 3, 7)
    asked = []

    def dying(prompts, seeds):
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return draw(prompts, seeds)

    with pytest.raises(KeyboardInterrupt):
        build_scored_pairs(tmp_path / "killed", dying, score, PROMPTS, 3, 7)
    build_scored_pairs(tmp_path / "killed", dying, score, PROMPTS, 3, 7)
    assert asked == [48, 48, 48, 24]
    whole, killed = (pq.read_table(tmp_path / n / "pairs.parquet") for n in ("whole", "killed"))
    assert whole.equals(killed)


def test_another_build_in_the_folder_is_refused(tmp_path):
    build_scored_pairs(tmp_path, draw, score, PROMPTS, 3, 0)
    with pytest.raises(DataError, match="another --output"):
        build_scored_pairs(tmp_path, draw, score, PROMPTS, 3, 1)
