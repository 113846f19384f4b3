"""Fill in what an evaluation takes from the pairs and from the scorer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from inversion_dpo.data.source import open_pairs
from inversion_dpo.run.disk import atomic_text
from inversion_dpo.run.fields import Config, ConfigError
from inversion_dpo.run.processes import current_team
from inversion_dpo.training.recipe import split_pairs


def settled(config: Config, folder: Path) -> Config:
    """Replace ``prompts=heldout`` by a file in ``folder``, ``preference=auto`` by the only score.

    Raises:
        ConfigError: the held-out pairs have no caption of their own, or there are several scorers.
        DataError: the pairs cannot be read.
    """
    e, file = config.evaluation, folder / "heldout-prompts.jsonl"
    if e.prompts == "heldout":
        if current_team().main:
            lines = [json.dumps({"prompt": text}) for text in heldout_captions(config)]
            folder.mkdir(parents=True, exist_ok=True)
            atomic_text("\n".join(lines) + "\n", file)
        current_team().wait()
        e = replace(e, prompts=str(file))
    if e.preference == "auto" and e.scorer:
        names = e.scorer.split(",") if isinstance(e.scorer, str) else e.scorer
        if len(names) > 1:
            raise ConfigError(
                "evaluation.preference=auto needs one scorer; name the score by which the pairs "
                f"were labelled, e.g. evaluation.preference={names[0]}"
            )
        e = replace(e, preference=names[0].rpartition(":")[2].strip())
    return replace(config, evaluation=e)


def heldout_captions(config: Config) -> list[str]:
    """List the captions that only held-out pairs have, each once, in their order."""
    if config.inversion.max_error is not None:
        raise ConfigError(
            "evaluation.prompts=heldout does not know which pairs inversion.max_error leaves out: "
            "give a file of prompts"
        )
    captions = [pair.caption for pair in open_pairs(config.data).read(lambda number: False)]
    trained, held = split_pairs(list(range(len(captions))), config.data.holdout)
    seen = {captions[number] for number in trained}
    found = [c for c in dict.fromkeys(captions[number] for number in held) if c not in seen]
    if not found:
        raise ConfigError(
            f"evaluation.prompts=heldout: every caption of the {len(held)} held-out pairs is "
            "trained on too: give a file of other prompts"
        )
    return found
