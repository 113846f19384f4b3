"""Find the noun phrases of T2I-CompBench's prompts, as its scorer ``compbench`` needs them.

It needs spaCy and a model of it, and nothing of this project::

    pip install spacy==3.6.1 MODEL          # en_core_web_sm 3.6.0 as a wheel
    python tools/noun_phrases.py FOLDER src/inversion_dpo/assets/t2i-compbench-phrases.json

FOLDER holds the six ``CATEGORY_val.txt`` of ``examples/dataset`` at the revision that
``prompt-sets.yaml`` names. The file has, by category and in the order of the prompts, the places
of the phrases in each prompt: ``"0-13 18-29"``. The authors' rule takes spaCy's noun chunks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the prompts")
    parser.add_argument("output", type=Path, help="the JSON file to write")
    parser.add_argument("--model", default="en_core_web_sm", help="of spaCy, a name or a folder")
    given = parser.parse_args()
    import spacy

    parse = spacy.load(given.model)
    places = {}
    for category in CATEGORIES:
        text = (given.folder / f"{category}_val.txt").read_text(encoding="utf-8")
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        chunks = ([(c.start_char, c.end_char) for c in parse(p).noun_chunks] for p in prompts)
        places[category] = [" ".join(f"{a}-{b}" for a, b in each) for each in chunks]
    given.output.write_text(json.dumps(places, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    main()
