"""The benchmark for a GPU measures every row, in miniature, and goes on where its time ended."""

import json
import sys
from functools import partial

import pytest
import torch

pytestmark = pytest.mark.slow


def test_rows_are_measured_once(tmp_path, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(gpu, "BATCHES", (4, 2))
    monkeypatch.setattr(gpu, "repeated", lambda works, device: 3 * [(0.1,) * len(works)])
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--miniature", "--seconds", "0"])
    gpu.main()
    assert "the time is over" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--miniature"])
    gpu.main()
    gpu.main()  # nothing is measured twice
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    wanted = list(gpu.rows(gpu=False))
    assert [gpu.Row(*(r[k] for k in gpu.ROW)) for r in rows] == wanted
    assert all(r["fits"] and r["seconds"] > 0 and r["share"] > 0 for r in rows)
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("\n|") == 2 + len(wanted)
    assert "sdxl step lora x4 plain / diffusion_dpo: 1.000, aim 0.78 missed" in text
    assert "best sdxl invert" in text and "x4 widened: x 1.00 of plain" in text
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == rows
