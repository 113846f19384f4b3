"""Build the linear heads of ImageReward, the aesthetic predictors and HPSv3."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError

PLACES = (0, 2, 4, 6, 7)  # in the authors' Sequential, whose dropouts stand between


def linear_head(
    weights: dict[str, Tensor], prefix: str, places: Sequence[int] = PLACES
) -> nn.Sequential:
    """Build linear layers without activations, in order; KeyError names a missing weight.

    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor, simple_inference.py;
    https://github.com/THUDM/ImageReward, ImageReward/ImageReward.py. The dropouts between the
    layers do nothing after training and are left out.
    """
    layers = []
    for place in places:
        weight = weights[f"{prefix}{place}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": weights[f"{prefix}{place}.bias"]})
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def head_of(
    checkpoint: Checkpoint,
    prefix: str,
    places: Sequence[int] = PLACES,
    file: str = "model.safetensors",
) -> nn.Sequential:
    """Build :func:`linear_head` from a file of a checkpoint; ScorerError if a weight is missing."""
    weights = checkpoint.tensors(file)
    try:
        return linear_head(weights, prefix, places)
    except KeyError as error:
        raise ScorerError(checkpoint.complaint(f"no head: {error} is missing")) from error
