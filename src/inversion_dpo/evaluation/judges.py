"""Judge the judges: which scores labelled the pairs, how they agree, what they may have missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.data.traits import shares_text
from inversion_dpo.evaluation.metrics import PAIRS_AGREE, metric_rows, outcome, win_rate, wins
from inversion_dpo.evaluation.wording import shares_of
from inversion_dpo.run.words import typed

Scores = Mapping[str, NDArray[Any]]
LABELLER = 0.75  # the least share of pairs, by its interval, that a labeller orders as they are
BY_SCORE = "by_score"  # in PAIRS_AGREE: the shares of all scores


def order_of_pairs(values: Scores, preference: str) -> dict[str, Any]:
    """Measure in what share of pairs the winner has the higher score; ties count half.

    Args:
        values: scores of images by name, [2 n]: winner, loser, winner, ...
        preference: the score whose ``share``, ``low`` and ``high`` are returned by themselves.

    Returns:
        These, ``n`` pairs, and under ``by_score`` the same three of every score.
    """
    shares = {name: win_rate(scores[1::2], scores[::2]) for name, scores in values.items()}
    rows = {name: {"share": s.value, "low": s.low, "high": s.high} for name, s in shares.items()}
    return rows[preference] | {"n": len(values[preference]) // 2, BY_SCORE: rows}


def labellers(metrics: Mapping[str, Any]) -> list[str]:
    """List the scores that order the pairs as their labels do, in so many that chance cannot.

    Such a score labelled them, or is as good as the one that did.
    """
    rows = metrics.get(PAIRS_AGREE, {}).get(BY_SCORE, {})
    return [name for name, row in rows.items() if row["low"] > LABELLER]


def agreement(reference: Scores, policy: Scores, preference: str) -> dict[str, Any]:
    """Measure on what share of prompts each score prefers the same side as ``preference``.

    Args:
        reference: scores [n, s] by name.
        policy: the same, from the same noise.
        preference: a name.

    Returns:
        win_rate, win_rate_low and win_rate_high of "the same side" by score, ties counting half.
        The preference itself is left out.
    """
    signs = {k: np.sign((policy[k] - reference[k]).mean(axis=1)) for k in reference}
    same = {k: signs[k] * signs[preference] for k in signs if k != preference}
    return {name: wins(np.zeros(len(product)), product) for name, product in same.items()}


def most_worsened(reference: Scores, policy: Scores, names: Sequence[str], count: int) -> list[int]:
    """List the images that lose most, worst first: the mean over ``names`` of gain by its spread.

    Args:
        reference: scores [n] by name.
        policy: the same.
        names: of the scores that count; one without any spread does not.
        count: at most so many; an image that did not lose is not listed.
    """
    gains = [policy[name] - reference[name] for name in names if name in reference]
    scaled = [gain / gain.std() for gain in gains if gain.std() > 0]
    if not scaled:
        return []
    mean = np.mean(scaled, axis=0)
    return [int(k) for k in np.argsort(mean, kind="stable")[:count] if mean[k] < 0]


def independent(metrics: Mapping[str, Any]) -> list[str]:
    """List the scores that did not label the pairs; all scores if every one did."""
    names, labelled = list(metric_rows(metrics)), labellers(metrics)
    return [name for name in names if name not in labelled] or names


def doubts(metrics: Mapping[str, Any], run: str = "RUN") -> list[str]:
    """Say what speaks against a labeller's gain: no judge but it, or one look on most images.

    run: the folder, for the advice.
    """
    labelled, rows = labellers(metrics), metric_rows(metrics)
    read = {k: outcome(r, metrics["n_prompts"]) for k, r in rows.items()}
    others = [name for name in rows if name not in labelled]
    gained = ", ".join(f"`{name}`" for name in labelled if read[name] == "gain")
    changed = {name: share for name, share in shares_of(metrics).items() if not share.chance}
    most = any(share.low > LABELLER or share.high < 1 - LABELLER for share in changed.values())
    confirmed = any(read[name] == "gain" for name in others)
    if not labelled or (others and (not gained or (confirmed and not most))):
        return []
    if not others:
        names = ", ".join(f"`{name}`" for name in labelled)
        text = f"Every scorer asked orders the pairs as their labels do ({names}): it judges what "
        text += f"it taught. Ask another one, or people: `inversion-dpo web {typed(run)}`."
    elif confirmed:
        text = f"The labeller's gain ({gained}) comes with one look on most images. A score that "
        text += "likes this look gains by it alone: see the pictures."
    else:
        lost = [f"`{name}`" for name in others if read[name] == "loss"]
        text = f"Only the labeller sees a gain ({gained})"
        text += f", and {', '.join(lost)} a loss" if lost else ", no other scorer does"
        text += ". The policy may have learned the labeller's weakness."
    shares = shares_text(changed).replace(" !", "")
    looks = f" Share of prompts where the policy's image is: {shares}." if changed else ""
    return [text + looks]
