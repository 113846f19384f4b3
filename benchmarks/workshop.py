"""Bring ``tools/`` to the scripts of this folder, which are run by their paths."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.embedded.painting import render  # noqa: E402
from tools.tiny.pipelines import CLIP_WIDTH, write_tiny  # noqa: E402

__all__ = ["CLIP_WIDTH", "render", "write_tiny"]
