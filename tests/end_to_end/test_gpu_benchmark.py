"""The benchmark for a GPU measures every kind of row, in miniature, and goes on."""

import json
import sys

import pytest

pytestmark = pytest.mark.slow


def test_rows_are_measured_once(tmp_path, monkeypatch, capsys):
    import gpu

    wanted = [
        gpu.Row("sdxl", "invert", batch=8),
        gpu.Row("flux", "bare"),
        gpu.Row("flux", "step", "full", 2, "checkpointing"),
        gpu.Row("sdxl", "diffusion_dpo", "lora", 2),
        gpu.Row("flux", "sample", batch=2),
    ]
    monkeypatch.setattr(gpu, "rows", lambda: wanted)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--miniature", "--seconds", "0"])
    gpu.main()
    assert "the time is over" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--miniature"])
    gpu.main()
    gpu.main()  # nothing is measured twice
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [gpu.Row(*(r[k] for k in gpu.Row.__dataclass_fields__)) for r in rows] == wanted
    assert all(r["fits"] and r["seconds"] > 0 and 0 < r["share"] < 1 for r in rows)
    assert (tmp_path / "gpu.md").read_text().count("\n|") == 2 + len(wanted)
