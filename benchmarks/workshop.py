"""Bring ``tools/`` to the scripts of this folder, which are run by their paths."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.drawn import pairs as drawn_pairs  # noqa: E402
from tools.drawn import scorers as drawn_scorers  # noqa: E402
from tools.embedded.painting import render  # noqa: E402
from tools.tiny.parts import CLIP_WIDTH  # noqa: E402
from tools.tiny.pipelines import write_tiny  # noqa: E402

__all__ = ["CLIP_WIDTH", "drawn_pairs", "drawn_scorers", "render", "write_tiny"]
