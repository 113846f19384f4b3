"""Run the whole path from Python, in five lines.

```python
from inversion_dpo.api import align, evaluate, report

run = align("taste", "runs/api", "training.steps=40")
print(evaluate(run)["win_rate"])
print(report(run))
```
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from numbers import Integral
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inversion_dpo.run.fields import Config, ConfigError, EvaluationConfig
from inversion_dpo.run.folder import (
    check_output,
    claim,
    claimed,
    going_on,
    occupied,
    read_config,
    run_file,
)
from inversion_dpo.training.effects import load_checked

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)


def align(preset: str | Path, output: str | Path, *overrides: str) -> Path:
    """Invert the pairs and train the policy.

    A second call with the same arguments continues where the first one stopped.

    Args:
        preset: a packaged preset (taste, sdxl, flux, z-image, ...) or a YAML file.
        output: the run's folder.
        overrides: ``key=value`` settings, as on the command line.

    Returns:
        The run's folder, with the LoRA in ``adapter``.

    Raises:
        ConfigError: a setting cannot work, or the folder belongs to another run.
        DataError: pairs cannot be used; it names file, row and remedy.
        BusyError: another run is using the folder.
    """
    from inversion_dpo.training.recipe import train

    folder, config = Path(expanduser(output)), load_checked(str(preset), _texts(overrides), "train")
    check_run(config, folder)
    with occupied(folder):
        claim(folder, config)
        train(config, folder)
    return folder


def _texts(overrides: Sequence[Any]) -> Sequence[str]:
    """Return settings that are texts; ConfigError for a list or dictionary of them."""
    if other := [given for given in overrides if not isinstance(given, str)]:
        raise ConfigError(
            f"{other[0]!r} is no setting: write each as a text of its own, such as "
            '"training.steps=200", and a list of them as *settings'
        )
    return overrides


def check_run(config: Config, folder: Path) -> None:
    """Check, before hours are spent, what a training needs: folder, pairs, model, tracker.

    Nothing is written. Prompts that only the evaluation needs are warned of, since it may run
    elsewhere.

    Raises:
        ConfigError, DataError, ModelError, ScorerError, DiskError: the first fault and what to do.
    """
    from inversion_dpo.evaluation.defaults import check_scores
    from inversion_dpo.evaluation.prompt_sets import read_prompts
    from inversion_dpo.models.loading import check_model
    from inversion_dpo.training.beforehand import check_data, check_training
    from inversion_dpo.training.trackers import check_tracker

    check_output(folder, config)
    check_tracker(config.training.tracker)
    try:
        check_scores(config)
    except ConfigError as error:
        e, usual = config.evaluation, EvaluationConfig()
        if (e.scorer, e.preference) != (usual.scorer, usual.preference):
            raise
        logger.warning("%s. Name them before `inversion-dpo evaluate`", error)
    # before a hub that is not reached is asked again and again
    check_data(config, config.inversion.folder(folder))
    try:
        if config.evaluation.prompts != "heldout":
            read_prompts(config.evaluation.prompts, 1)
    except ConfigError as error:
        logger.warning("%s. Mend it before `inversion-dpo evaluate`", error)
    check_training(config, check_model(config.model), folder)


def evaluate(
    run: str | Path,
    *overrides: str,
    policy: str | Path | None = None,
    reference: str | Path | None = None,
    preset: str | Path = "taste",
    protocol: str | None = None,
    against: str | Path | Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Sample reference and policy from the same noise and score both.

    Args:
        run: a trained run's folder.
        overrides: ``evaluation.key=value`` settings, which ``report`` uses too.
        policy: a model instead of the run's: the folder of a run, a LoRA or a pipeline, a LoRA
            file, or a hub id.
        reference: a model instead of the configuration's, in the same forms.
        preset: settings, where the folder holds no run and ``policy`` is given.
        protocol: how a paper judges, by name; ``overrides`` change it, and the table says so.
        against: a further model that the protocol compares with the reference, or several.

    Returns:
        What ``metrics.json`` holds; under a protocol, what ``protocols/NAME.json`` does.

    Raises:
        ConfigError: no such run, scorer, model or protocol.
        BusyError: another command is using the folder.
    """
    from inversion_dpo.evaluation.evaluate import evaluate as evaluate_run
    from inversion_dpo.evaluation.protocols import judge_by, protocol_of

    folder = Path(expanduser(run))
    policy, reference = (expanduser(str(m)) if m else None for m in (policy, reference))
    against = [against] if isinstance(against, str | Path) else against
    others = [expanduser(str(model)) for model in against]
    if others and protocol is None:
        raise ConfigError("--against needs --protocol, or give the other model as --policy")
    how = protocol_of(protocol) if protocol else None
    known = policy is None or (folder / "config.yaml").is_file()
    settings = how.overrides(_texts(overrides)) if how else _texts(overrides)
    config = load_checked(run_file(folder) if known else str(preset), settings, "evaluate")
    named = (reference, policy or str(folder)) if policy or reference else None
    with occupied(folder), claimed(folder, config):
        if how:
            how = how.chosen(overrides, config)
            return judge_by(how, folder, config, policy or str(folder), others, reference)
        return evaluate_run(folder, config, models=named)


def report(run: str | Path) -> Path:
    """Write ``report.html`` of an evaluated run, and its figures as PNG with their data.

    Raises:
        ConfigError: the run was not evaluated.
        BusyError: another command is using the folder.
    """
    from inversion_dpo.evaluation.report import check_evaluated
    from inversion_dpo.evaluation.report import report as write

    folder = Path(expanduser(run))
    check_evaluated(folder)
    with occupied(folder):
        return write(folder)


def sample(
    run: str | Path,
    prompts: str | Sequence[str],
    seed: int = 0,
    policy: bool = True,
    sources: Sequence[Image.Image] = (),
) -> list[Any]:
    """Sample one image for each prompt, from a run's policy or its reference.

    Args:
        run: a trained run's folder.
        prompts: one image each; a text alone is one prompt.
        seed: of the first image; each next image adds 1. Both models get the same noise from it.
        policy: False samples the reference.
        sources: the image that each prompt edits, for an editing model.

    Returns:
        Images [H, W, 3], uint8.

    Raises:
        ConfigError: no such run, or one without a policy, or a seed that is no whole number.
    """
    from inversion_dpo.evaluation.sides import adapter_of, sampler_of

    if not isinstance(seed, Integral) or seed < 0:
        raise ConfigError(f"seed={seed!r} must be a whole number of at least 0")
    folder = Path(expanduser(run))
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if policy and (text := going_on(folder)):
        logger.warning(text)
    sampler = sampler_of(read_config(folder), adapter_of(folder) if policy else None)
    seeds = [seed + k for k in range(len(prompts))]
    sampler.warn_of_cut(prompts)
    return sampler.draw(prompts, seeds, sources=sources)
