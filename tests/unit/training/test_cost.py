"""What a run takes, worked out by hand; and a file of measured figures."""

import json
from functools import cache
from pathlib import Path

import pytest

from inversion_dpo.models.loading import check_model
from inversion_dpo.run.config import load_config
from inversion_dpo.run.fields import ModelConfig
from inversion_dpo.training import cost
from inversion_dpo.training.cost import Card, Job, estimate, job_of

STEPS = ["inversion.steps=4", "training.steps=10", "training.batch_size=3"]


@pytest.mark.parametrize(
    ("more", "inverted", "each"),
    [
        ([], 5, 2),  # states 0 to 4; forward, and backward to the states alone
        (["policy.kind=full", "training.gradient_checkpointing=true"], 5, 3 + 1),
        (["objective.name=diffusion_dpo"], 0, 2 + 1),  # the reference
        (["objective.name=sft"], 0, 2),
        (["objective.path=line"], 5, 2 + 1),
        (["data.prompt_dropout=0.1"], 5, 2 + 1),
        (["objective.states=3", "objective.guidance_scale=2"], 5 + 4, 2 * 3 * 2),
        (["objective.name=inpo"], 0, 2 + 1 + 2.5),  # inverted up to a level from 1 to 4
    ],
)
def test_passes_by_hand(more, inverted, each):
    job = job_of(load_config(None, STEPS + more), 7)
    assert job.inversion == 2 * 7 * inverted and job.training == 2 * 10 * 3 * each


def test_hours_by_hand():
    card = Card("a", 1e12, {"inversion": 0.5, "full": 0.25}, "")
    hours = Job(3600.0, 1800.0, "full").hours(1e9, card, cards=2)
    assert hours == pytest.approx((3600e9 / 0.5 / 2e12 / 3600, 1800e9 / 0.25 / 2e12 / 3600))


def test_a_dry_run_estimates_without_weights(tiny, pair_file, monkeypatch):
    monkeypatch.setattr(cost, "forward_flops", forward_flops := cache(cost.forward_flops))
    known = check_model(ModelConfig(str(tiny("sd15"))))
    assert forward_flops(known, (128, 128)) > 3 * forward_flops(known, (64, 64)) > 1e6
    unknown = check_model(ModelConfig(str(tiny("z-image"))))
    config = load_config(None, [*STEPS, f"data.pairs={pair_file}"])
    assert len(estimate(config, known)) == 2  # nobody plans for less than seconds
    monkeypatch.setattr(cost, "SHORT", 0)
    text = estimate(config, known)
    assert "160 for the inversion of 16 pairs, 120 in training" in text[0]
    assert text[1] == "training sees each pair 2.1 times"  # 10 steps of 3, of 16 less a tenth
    assert "TFLOP each: about" in text[2] and "inversion is assumed" in text[3]
    assert "`invert` times it" in estimate(config, unknown)[2]


def test_the_cost_of_a_job_reads_what_a_card_was_measured_to_do(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    import job_cost

    rows = [
        {"work": "step", "kind": "lora", "share": share, "fits": fits}
        for share, fits in ((0.4, True), (0.5, True), (0.9, False))
    ]
    rows.append({"work": "invert", "kind": "lora", "share": 0.6, "fits": True})
    told = {"device": "card", "matmul_flops": 1e15, "date": "today", "rows": rows}
    (tmp_path / "gpu.json").write_text(json.dumps(told))
    card = job_cost.card_of(tmp_path / "gpu.json")
    assert (card.shares["lora"], card.shares["inversion"]) == (0.5, 0.6)
    monkeypatch.setattr(job_cost, "MODELS", {"SDXL": ("lora", 4, 128, 0)})
    monkeypatch.setattr(job_cost, "forward", lambda name: 1e12)
    lines = [line for line in job_cost.lines(card, 2.0) if line.startswith("| SDXL")]
    # 2e4 images, 21 passes of 1e12 at 6e14 a second; 4 visits of 2 passes at 5e14
    hours = 2e4 * 21 / 600 / 3600, 2e4 * 4 * 2 / 500 / 3600
    assert f"| 1 | {hours[0]:.2f} + {hours[1]:.2f} |" in lines[0] and len(lines) == 6
    assert lines[0].endswith(f"| {sum(hours) * 2:,.0f} | {2e4 * 4 * 3 / 500 / 3600 * 2:,.0f} |")
