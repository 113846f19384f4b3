"""Scripts run by their paths from a clone, as the documentation writes them."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])
PARTS = {"__init__.py", "workshop.py", "mixture_model.py", "faults_launched.py"}  # not run alone


def test_tools_are_found_through_the_workshop():
    """The wheel has no tools/, and a script's own folder is all that Python looks in."""
    direct = re.compile(r"^(from|import) (tools|tests)\b", re.M)
    assert {p.name for p in SCRIPTS if direct.search(p.read_text())} <= {"workshop.py"}


@pytest.mark.parametrize("name", ["tools.settings_page", "tools.embedded.compositional"])
def test_a_tool_that_writes_explains_itself_first(name, monkeypatch, capsys):
    """The other tools take options anyway."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(name, run_name="__main__")
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.name not in PARTS], ids=lambda p: p.name)
def test_a_script_explains_itself(path, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run(
        [sys.executable, path, "--help"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"usage:" in done.stdout
