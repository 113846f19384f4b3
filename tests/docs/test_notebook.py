"""The notebook runs top to bottom, and ships without outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial" / "notebook.ipynb"


def test_it_ships_without_outputs_or_counts():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert len(code) >= 8
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)


def test_what_it_imports_is_there():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    lines = [line for c in cells if c["cell_type"] == "code" for line in c["source"]]
    imports = [line for line in lines if line.startswith(("from inversion_dpo", "import inv"))]
    assert len(imports) >= 5
    exec("\n".join(imports), {})


@pytest.mark.slow
def test_it_runs_top_to_bottom(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1] / "src"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
    text = "".join(o.get("text", "") for o in outputs)
    assert "loss 0.693" in text and "win rate" in text
    assert "report.html" in outputs[-1]["data"]["text/plain"]
