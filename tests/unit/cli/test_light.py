"""Commands that load no model start at once: they import no torch."""

import json
import re
import subprocess
import sys

import pytest
import typer

from inversion_dpo.cli.main import app
from inversion_dpo.run.config import to_yaml
from inversion_dpo.training.effects import GROUPS, READS

HEAVY = {"accelerate", "datasets", "diffusers", "matplotlib", "pandas", "peft", "torch"}
HEAVY |= {"transformers"}
SCRIPT = """
import json, sys
from inversion_dpo.cli.main import main
found = {}
for words in json.loads(sys.argv[1]):
    try:
        main(words)
        code = 0
    except SystemExit as stop:
        code = stop.code
    found[" ".join(words)] = [code, sorted({m.partition(".")[0] for m in sys.modules})]
from pathlib import Path
from inversion_dpo.cli.label import QUESTIONS, page_of, subject_of
for given in sys.argv[2:]:
    about = subject_of(given, "taste", [], Path(sys.argv[2]) / "labels.sqlite")
    page_of(about, 4, ("pairs", QUESTIONS["pairs"]), [])[1]()
    found[f"web {given}"] = [0, sorted({m.partition(".")[0] for m in sys.modules})]
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory, pair_file, tiny_config):
    """Exit code and imported packages after each command, one after another in one process."""
    run = tmp_path_factory.mktemp("light") / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(tiny_config()))
    rows = [{"step": k, "loss": 0.69, "accuracy": 0.5, "seconds": 1.0} for k in range(1, 9)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = run / "pairs.csv"
    table.write_text("caption,winner,loser\n")
    commands = typer.main.get_command(app).commands
    names = [*([n] for n in commands), *(["pairs", n] for n in commands["pairs"].commands)]
    words = [[*name, "--help"] for name in ([], *names)]
    words += [["--version"], ["config", "sdxl"], ["advise", str(run)]]
    words += [["pairs", "check", str(data)] for data in (pair_file, table)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(words), str(run), str(pair_file)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_loads_no_model_imports_no_torch(imported):
    assert len(imported) > 25
    for command, (code, packages) in imported.items():
        assert not HEAVY & set(packages), command
        assert "numpy" not in packages or command.startswith(("advise", "pairs check", "web"))
        assert code == 0 or command.endswith("pairs.csv"), command


def test_on_windows_it_says_where_it_runs():
    """It locks, measures and replaces files as Linux and macOS do."""
    code = "import os, pathlib; os.name = 'nt'; import inversion_dpo.cli.main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    said = "ImportError: inversion-dpo runs on Linux and macOS. On Windows run it inside WSL 2"
    assert done.stderr.splitlines()[-1] == said


@pytest.mark.parametrize("command", ["evaluate", "fid", "pairs build", "pairs sample", "sample"])
def test_help_names_the_groups_of_settings_that_a_command_reads(command):
    found = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    text = next(p.help for p in found.params if p.metavar and "KEY=VALUE" in p.metavar)
    groups = {key.partition(".")[0] for key in READS[command]}
    assert {g for g in GROUPS if re.search(rf"\b{g}\b", text.partition(", e.g.")[0])} == groups
