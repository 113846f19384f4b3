"""Settings that exclude or need each other; each setting's own limits are on its field."""

from __future__ import annotations

from inversion_dpo.run.fields import Config, ConfigError


def check_combinations(config: Config) -> None:
    """Refuse what cannot work before anything is loaded; ConfigError names key and remedy."""
    objective, inversion, training = config.objective, config.inversion, config.training
    build = config.build
    if config.policy.kind == "scene_graph" and config.policy.merge:
        raise ConfigError("policy.merge=true is for a LoRA: policy.kind=scene_graph has none")
    if objective.target == "transition" and inversion.fixed_point_iterations:
        raise ConfigError(
            "objective.target=transition vanishes under exact inversion: its signal is the "
            "inversion's own error. Set inversion.fixed_point_iterations=0 or objective.target=x0"
        )
    if objective.target == "transition" and inversion.keep is not None:
        raise ConfigError(
            "objective.target=transition needs the neighbour of every state: set "
            "inversion.keep=null, or objective.target=x0"
        )
    if inversion.max_error is not None and not inversion.reconstruct:
        raise ConfigError("inversion.max_error needs inversion.reconstruct=true, which measures it")
    if objective.name == "inversion_dpo_released" and objective.target not in (None, "reference"):
        raise ConfigError(
            "objective.name=inversion_dpo_released reproduces the released script's sign and is "
            "defined for objective.target=reference only"
        )
    if (objective.loss or objective.name) == "smpo" and not objective.soft_labels:
        raise ConfigError(
            "objective.name=smpo scales each pair by its soft label, and without them is another "
            "method: set objective.soft_labels=true, or objective.name=inpo"
        )
    if objective.t_min >= objective.t_max:
        raise ConfigError(
            f"objective.t_min={objective.t_min} must be below objective.t_max={objective.t_max}"
        )
    if inversion.t_start and not inversion.start:
        raise ConfigError(
            f"inversion.t_start={inversion.t_start} must be 0, to invert from the clean image, or "
            f"at least {1 / inversion.steps:g} (one of inversion.steps={inversion.steps})"
        )
    if training.batch_size % training.gradient_accumulation:
        raise ConfigError(
            f"training.batch_size={training.batch_size} must be a multiple of "
            f"training.gradient_accumulation={training.gradient_accumulation}"
        )
    if build.splits and not build.once and build.mining not in ("best_worst", "majority"):
        raise ConfigError(
            f"build.mining={build.mining} may put an image into several pairs; in a dataset each "
            "stands in one: set build.once=true"
        )
    if build.prompts == "scenes" and not (build.mix and build.splits):
        raise ConfigError("build.prompts=scenes needs build.mix and build.splits")
