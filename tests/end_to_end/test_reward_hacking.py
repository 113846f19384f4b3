"""A scorer that likes saturation labels the pairs; the report has to find out."""

import sys
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance

from inversion_dpo.api import align, evaluate, report
from inversion_dpo.data.images import decode_image, png
from inversion_dpo.evaluation.judges import doubts, labellers
from inversion_dpo.run.config import resolve
from inversion_dpo.world.checker import judge


def saturation(images, prompts):
    """The mean difference between the strongest and the weakest colour of a pixel."""
    return [float(np.ptp(image.astype(float), axis=2).mean()) for image in images]


def right(images, prompts):
    """Whether the image shows what its prompt asks for, whatever its look."""
    return judge(images, prompts)["exact"]


def coloured(encoded, factor):
    image = Image.fromarray(np.asarray(decode_image(encoded, "")))
    return png(np.asarray(ImageEnhance.Color(image).enhance(factor)))


@pytest.mark.slow
def test_a_reward_that_is_easy_to_hack_is_found_out(tmp_path, monkeypatch):
    module = ModuleType("own_saturation")
    module.saturation, module.right = saturation, right
    monkeypatch.setitem(sys.modules, "own_saturation", module)
    rows = pq.read_table(resolve("asset:taste.parquet")).slice(0, 48).to_pylist()
    pairs = [  # the labeller does not read: it takes a strong picture of another prompt's scene
        {
            "jpg_0": coloured(other["jpg_0"], 1.8),
            "jpg_1": coloured(row["jpg_0"], 0.6),
            "label_0": 1.0,
            "label_1": 0.0,
            "caption": row["caption"],
        }
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "pairs.parquet")
    run = align(
        "taste",
        tmp_path / "run",
        f"data.pairs={tmp_path / 'pairs.parquet'}",
        "data.allow_giveaways=true",
        "training.steps=40",
        "training.batch_size=8",
    )
    quick = ["evaluation.limit=40", "evaluation.sample_steps=8"]
    own = "own_saturation:saturation"
    alone = evaluate(run, f"evaluation.scorer={own}", "evaluation.preference=saturation", *quick)
    assert labellers(alone) == ["saturation"] and alone["saturation"]["gain_low"] > 0
    assert "Every scorer asked" in doubts(alone)[0] and "more colourful" in doubts(alone)[0]
    scorers = f"evaluation.scorer=[{own}, own_saturation:right]"
    both = evaluate(run, scorers, "evaluation.preference=saturation", *quick)
    assert both["saturation"]["gain_low"] > 0 >= both["right"]["gain_low"], both["right"]
    assert both["traits"]["more colourful"]["low"] > 0.5
    assert labellers(both) == ["saturation"] and "right" in both["agreement"]
    page = report(run).read_text()
    assert "labelled the pairs" in page and "more colourful" in page
    assert "Only the labeller sees a gain" in page
    assert "may have learned the labeller" in page
    assert "Share of prompts where the policy" in page and "more colourful" in doubts(both)[0]
