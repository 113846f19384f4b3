"""Commands that load no model start at once: they import no torch."""

import json
import subprocess
import sys

import pytest

from inversion_dpo.run.config import to_yaml

HEAVY = {"accelerate", "datasets", "diffusers", "matplotlib", "peft", "torch", "transformers"}
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
    found[" ".join(words[:2])] = [code, sorted({m.partition(".")[0] for m in sys.modules})]
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
    words = (["--help"], ["--version"], ["config", "sdxl"], ["train", "--help"])
    words += (["advise", str(run)], ["pairs", "check", str(pair_file)])
    words += (["pairs", "check", str(table)],)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_loads_no_model_imports_no_torch(imported):
    codes = [code for code, _ in imported.values()]
    assert codes[:5] == [0, 0, 0, 0, 0]
    for command, (_, packages) in imported.items():
        assert not HEAVY & set(packages), command
