"""The picture of the worst reconstructions."""

import numpy as np
import torch

from inversion_dpo.evaluation.reconstruction import captioned


def test_every_row_stands_above_its_numbers_and_small_images_are_enlarged():
    rows = [
        (f"pair {k}, winner: {k} dB", torch.full((3, 8, 16), v)) for k, v in enumerate((-1.0, 0.5))
    ]
    sheet = np.asarray(captioned(rows))
    assert sheet.shape == (22 + 2 * (8 * 32 + 22), 512, 3)
    assert (sheet[22 : 22 + 256] == 0).all() and (sheet[300:556] == 191).all()
    for top in (0, 22 + 256, 300 + 256):
        text = sheet[top : top + 22]
        assert text.min() < 100 and (text == 255).mean() > 0.8
