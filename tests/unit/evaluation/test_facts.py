"""The facts of a training in an evaluation are those of the policy that is judged."""

import pytest

from inversion_dpo.evaluation import evaluate
from inversion_dpo.evaluation.prompt_sets import PromptSet


@pytest.mark.parametrize("policy", ["", "someone/lora", None])
def test_facts_of_a_training_are_the_policys_own(policy, tiny_config, tmp_path, monkeypatch):
    nothing = ("structure", "scoring", "changes", "in_pairs", "diversity", "read_scores")
    for name in nothing:
        monkeypatch.setattr(evaluate, name, lambda *_: {})
    monkeypatch.setattr(evaluate, "both_sides", lambda *_: [tmp_path, tmp_path])
    monkeypatch.setattr(evaluate, "write_pictures", lambda *_: None)
    monkeypatch.setattr(evaluate, "read_prompt_set", lambda *_: PromptSet(["a"], [""], [None]))
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "heldout_accuracy": 0.9}\n')
    models = (None, policy or str(tmp_path)) if policy is not None else None
    found = evaluate.measure(tmp_path, tiny_config(), tmp_path, models)["training"]
    assert found == ({} if policy else {"heldout_accuracy": 0.9})
