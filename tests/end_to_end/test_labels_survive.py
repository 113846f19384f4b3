"""Clients label while the server is killed: benchmarks/labels.py in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "labels.py"


@pytest.mark.slow  # servers are started and killed for most of a minute
def test_no_label_is_lost_or_doubled():
    command = [sys.executable, str(SCRIPT), "--labels", "400", "--clients", "4", "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["labels"] == found["events"] == 400
    assert found["lost"] == found["doubled"] == found["wrong"] == 0
    assert found["sent again though stored"] > 0
