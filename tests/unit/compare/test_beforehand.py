"""What a comparison says of itself before its first run."""

from dataclasses import replace

import pytest

from inversion_dpo.cli import main as cli
from inversion_dpo.compare.beforehand import Plan, check_plan, lines
from inversion_dpo.run.config import ConfigError, load_config


def test_a_dry_run_counts_what_a_comparison_takes_and_writes_nothing(tmp_path, capsys):
    """500 prompts, 2,000 pairs; numbers worked out by hand.

    Inversion: two images of 2,000 pairs, nine states, three iterations for eight of them.
    Training: three times 60 steps of 32 pairs, two images, two passes for a LoRA, and one more for
    the reference where noise is fresh.
    """
    root = tmp_path / "run"
    given = ["--methods", "x0,diffusion_dpo", "--seeds", "3", "--curve-prompts", "0", "--dry-run"]
    start = ["compare", "-c", "composition", "-o", str(root), *given, "training.steps=60"]
    with pytest.raises(SystemExit):
        cli.main(start)
    text = capsys.readouterr().out
    assert "| x0 | 3 | 0 | 60 x 32 | 2,000 | 132,000 | 23,040 |" in text
    assert "| diffusion_dpo | 3 | 0 | 60 x 32 | 2,000 | 0 | 34,560 |" in text
    judged = 500 * 7 + 7 * (500 + 32 * 4)  # best of eight; reference and runs, with diversity
    assert f"{judged:,} images are sampled: {10 * judged:,} passes, 10 steps at guidance 1." in text
    assert not root.exists()
    with pytest.raises(SystemExit):
        cli.main([*start, "--rounds", "2", "--tune"])
    text = capsys.readouterr().out
    assert "\n2 rounds: each later one trains every run again" in text
    assert "as many trials first: x0 6, diffusion_dpo 6." in text


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--methods", "x0,dpo"], "no method 'dpo'"),
        (["data.pairs=nowhere.parquet"], "nowhere.parquet"),
        (["evaluation.scorer=null"], "compare needs evaluation.scorer"),
    ],
)
def test_a_dry_run_finds_what_would_stop_it(tmp_path, capsys, given, complaint):
    with pytest.raises(SystemExit):
        cli.main(["compare", "-c", "composition", "-o", str(tmp_path / "run"), "--dry-run", *given])
    assert complaint in capsys.readouterr().err


def test_a_method_is_not_varied_by_what_has_no_effect_on_it(tmp_path, caplog):
    """SFT at three values of beta was three times the same run, under three names."""
    plan = Plan("composition", ("x0", "sft"), 2, vary=("objective.beta=300,3000", "policy.rank=4"))
    names = [variant.name for variant, _ in lines(plan, tmp_path)]
    assert names == ["x0", "sft", "x0 beta=300", "x0 beta=3000", "x0 rank=4", "sft rank=4"]
    check_plan(tmp_path / "run", plan)
    assert (
        caplog.text.count("--vary objective.beta: it has no effect on sft, which is trained once")
        == 1
    )
    with pytest.raises(ConfigError, match="objective.beta=.* has no effect"):
        check_plan(tmp_path / "run", replace(plan, methods=("sft",)))


def test_a_dry_run_refuses_a_folder_that_holds_something_else(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        cli.main(["compare", "-c", "composition", "-o", str(tmp_path), "--dry-run"])
    assert "is not empty and holds no comparison" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "extra", "expected"),
    [
        # usual are 2000 for DPO, 1000 for KTO and .001 for DSPO
        ("sdxl", (), {"x0": 5000, "diffusion_dpo": 5000, "kto": 2500, "dspo": 0.001}),
        ("flux", (), {"x0": 100, "kto": 50, "mapo": 0.1, "sft": 100}),  # errors of a velocity
        ("sdxl", ("objective.beta=7",), {"x0": 7, "kto": 7, "dspo": 7}),
        ("composition", (), {"x0": 1000, "kto": 100, "dspo": 1, "nft": 1}),  # tuned values stay
    ],
)
def test_a_method_has_no_beta_of_another_loss(tmp_path, config, extra, expected):
    plan = Plan(config, tuple(expected), 1, extra=extra)
    runs = {v.name: load_config(config, given[0]) for v, given in lines(plan, tmp_path)}
    assert {name: run.objective.beta for name, run in runs.items()} == expected


def test_a_beta_of_ones_own_file_holds_for_all_methods(tmp_path):
    (tmp_path / "mine.yaml").write_text("objective:\n  beta: 70\n")
    plan = Plan(str(tmp_path / "mine.yaml"), ("x0", "kto"), 1)
    for _, runs in lines(plan, tmp_path):
        assert load_config(plan.config, runs[0]).objective.beta == 70
