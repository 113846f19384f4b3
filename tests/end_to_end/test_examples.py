"""The papers' settings in examples/: read, checked on tiny weights, run in miniature."""

import runpy
from pathlib import Path

import pytest

from inversion_dpo.cli.main import main
from inversion_dpo.evaluation.protocols import protocols
from inversion_dpo.run.config import load_config
from tests.slow import slow_but

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = sorted(EXAMPLES.glob("*/*.yaml"))
NAMES = [f"{file.parent.name}/{file.stem}" for file in SETTINGS]
each = pytest.mark.parametrize("file", SETTINGS, ids=lambda f: f"{f.parent.name}-{f.stem}")


def command(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def tiny_model(file, tiny):
    """Overrides that put tiny weights into the place of the paper's."""
    vae = ["model.vae=null"] if file.stem == "sdxl" else []
    return [f"model.path={tiny(file.stem)}", "model.resolution=64", *vae]


def test_four_papers_have_both_models_and_their_numbers():
    assert NAMES == [
        f"{paper}/{model}"
        for paper in ("diffusion-dpo", "inpo", "inversion-dpo", "kto")
        for model in ("sd15", "sdxl")
    ]
    costs = runpy.run_path(str(EXAMPLES / "costs.py"))
    for paper in costs["PAPERS"]:
        page = (EXAMPLES / paper / "README.md").read_text()
        assert all(line in page for line in costs["table"](paper))
    for paper, name in (("diffusion-dpo", "Diffusion-DPO"), ("inpo", "InPO")):
        page = (EXAMPLES / paper / "README.md").read_text()
        for protocol in ("sd15-dpo", "sdxl-dpo"):
            numbers = protocols()[protocol].published["rows"][name]
            row = next(line for line in page.splitlines() if f"{numbers[0]:.3f}" in line)
            assert [float(cell) for cell in row.split("|")[2:-1]] == numbers


@each
def test_the_learning_rate_is_the_papers_for_the_batch(file):
    t = load_config(str(file), []).training
    rate = 1e-7 if file.parent.name == "kto" else 1e-8 * t.batch_size
    assert t.learning_rate == pytest.approx(rate)
    assert t.batch_size % t.gradient_accumulation == 0


@pytest.mark.parametrize("name", slow_but(["inpo/sdxl"], NAMES))
def test_an_example_dry_runs_on_tiny_weights(name, tiny, pair_file, tmp_path, capsys):
    file = EXAMPLES / f"{name}.yaml"
    given = [*tiny_model(file, tiny), f"data.pairs={pair_file}", "data.holdout=0.25"]
    given += ["data.limit=null", "training.optimizer=adamw"]
    run = tmp_path / "run"
    code, out, err = command(capsys, "train", "-c", file, "-o", run, "--dry-run", *given)
    assert code == 0, err
    assert "learning_rate" in out and not run.exists()


@pytest.mark.slow
@each
def test_an_example_runs_to_the_end_in_miniature(file, tiny, pair_file, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a small red star\na cup\n")
    given = [*tiny_model(file, tiny), f"data.pairs={pair_file}", "data.holdout=0.25"]
    given += ["data.limit=null", "training.optimizer=adamw", "training.mixed_precision=no"]
    given += ["training.steps=2", "training.batch_size=4", "training.gradient_accumulation=1"]
    given += [
        "evaluation.scorer=null",
        "evaluation.preference=auto",
        f"evaluation.prompts={tmp_path / 'p.txt'}",
    ]
    given += ["evaluation.sample_steps=2"]
    given += ["inversion.steps=4"] if file.parent.name in ("inversion-dpo", "inpo") else []
    run = tmp_path / "run"
    for arguments in (
        ("train", "-c", file, "-o", run, *given),
        ("evaluate", run),
        ("report", run),
    ):
        code, _, err = command(capsys, *arguments)
        assert code == 0, err
    assert (run / "report.html").is_file()
