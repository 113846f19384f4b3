"""benchmarks/compositional.py: arms over seeds as Markdown."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from inversion_dpo.evaluation.breakdown import breakdown
from inversion_dpo.graphs.graph import Item, Relation, SceneGraph

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "compositional.py"
TWO = SceneGraph((Item(0, "cat"), Item(1, "dog")), (Relation(0, "above", 1),))
OTHER = SceneGraph(TWO.items, (Relation(1, "above", 0),))
ONE = SceneGraph((Item(0, "cat"),))


def run(folder, reference, policy, asked=(ONE, TWO)):
    folder.mkdir()
    found = {"structure": breakdown(list(asked), list(reference), list(policy))}
    (folder / "metrics.json").write_text(json.dumps(found))
    return str(folder)


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_means_over_seeds_with_t_intervals(tmp_path, monkeypatch, capsys):
    good = run(tmp_path / "a", (ONE, OTHER), (ONE, TWO))
    bad = run(tmp_path / "b", (ONE, OTHER), (ONE, OTHER))
    other = run(tmp_path / "c", (TWO, TWO), (ONE, TWO))
    arguments = ["--arm", "A", good, bad, "--arm", "B", other]
    lines = printed(monkeypatch, capsys, *arguments)
    at = lines.index("### Scene-graph IoU by number of objects")
    # one object is right in every run; of two A has 1 and 0: mean .5, t(1) .975 = 12.706,
    # sd .7071, so half a width of 6.353; the mean of all is .75 with half of that
    assert lines[at + 2] == "|  | 1 | 2 | all |"
    assert lines[at + 4] == "| reference of A | 1.000 | 0.000 | 0.500 |"
    assert lines[at + 6] == (
        "| A (2 seeds) | 1.000 [1.000, 1.000] | 0.500 [-5.853, 6.853] | 0.750 [-2.427, 3.927] |"
    )
    assert lines[at + 7] == "| B | 1.000 | 1.000 | 1.000 |"
    gains = printed(monkeypatch, capsys, *arguments, "--gains")
    at = gains.index("### Share of triples that hold, by relation")
    assert gains[at + 4] == "| A (2 seeds) | 0.500 [-5.853, 6.853] |"
    assert not [line for line in gains if "reference" in line]


def test_what_cannot_be_compared_is_named(tmp_path, monkeypatch, capsys):
    one = run(tmp_path / "a", (ONE, OTHER), (ONE, TWO))
    two = run(tmp_path / "b", (ONE,), (ONE,), asked=(ONE,))
    with pytest.raises(SystemExit, match="other prompts"):
        printed(monkeypatch, capsys, "--arm", "A", one, "--arm", "B", two)
    with pytest.raises(SystemExit, match="has no breakdown"):
        printed(monkeypatch, capsys, "--arm", "A", str(tmp_path))
