"""The whole path from Python, in five lines.

```python
from inversion_dpo.api import align, evaluate, report

run = align("taste", "runs/api", "training.steps=40")
print(evaluate(run)["win_rate"])
print(report(run))
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inversion_dpo.run.folder import claim, occupied, read_config
from inversion_dpo.training.effects import load_checked


def align(preset: str, output: str | Path, *overrides: str) -> Path:
    """Invert the pairs and train the policy; returns the run's folder, the LoRA in ``adapter``.

    Run again with the same arguments it goes on where it was left.

    Args:
        preset: a packaged preset (taste, composition, sd15, sdxl, sd35, flux) or a YAML file.
        output: the run's folder.
        overrides: ``key=value`` settings, as on the command line.

    Raises:
        ConfigError: a setting that cannot work, or a folder of another run.
        DataError: pairs that cannot be used, with file, row and remedy.
        BusyError: another run works on the folder.
    """
    from inversion_dpo.training.recipe import train

    folder, config = Path(output), load_checked(preset, list(overrides))
    with occupied(folder):
        claim(folder, config)
        train(config, folder)
    return folder


def evaluate(
    run: str | Path, *overrides: str, policy: str | None = None, reference: str | None = None
) -> dict[str, Any]:
    """Sample reference and policy from the same noise and score both; returns ``metrics.json``.

    Args:
        run: a trained run's folder.
        overrides: ``evaluation.key=value`` settings; they are kept for ``report``.
        policy: instead of the run's: the folder of a run, a LoRA or a pipeline, a LoRA file, or a
            hub id.
        reference: instead of the configuration's model: the same kinds.

    Raises:
        ConfigError: no run, no such scorer, or a model that is none.
    """
    from inversion_dpo.evaluation.evaluate import evaluate as evaluate_run

    folder = Path(run)
    config = load_checked(str(folder / "config.yaml"), list(overrides))
    named = (reference, policy or str(folder)) if policy or reference else None
    with occupied(folder):
        claim(folder, config)
        return evaluate_run(folder, config, models=named)


def report(run: str | Path) -> Path:
    """Write ``report.html`` of an evaluated run, and its figures as PNG with their data.

    Raises:
        ConfigError: the run was not evaluated.
    """
    from inversion_dpo.evaluation.report import report as write

    return write(Path(run))


def sample(run: str | Path, prompts: list[str], seed: int = 0, policy: bool = True) -> list[Any]:
    """One image [H, W, 3], uint8, of each prompt, by a run's policy or its reference.

    Args:
        run: a trained run's folder.
        prompts: one image each.
        seed: of the first image; the next adds 1. The same seeds give both models the same noise.
        policy: False samples the reference.
    """
    from inversion_dpo.evaluation.sides import sampler_of

    folder = Path(run)
    sampler = sampler_of(read_config(folder), folder / "adapter" if policy else None)
    return sampler.draw(prompts, [seed + k for k in range(len(prompts))])
