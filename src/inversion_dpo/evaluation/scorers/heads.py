"""Build the linear head that ImageReward and the aesthetic predictors share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

PLACES = (0, 2, 4, 6, 7)  # in the authors' Sequential, whose dropouts stand between


def linear_head(
    weights: dict[str, Tensor], prefix: str, places: Sequence[int] = PLACES
) -> nn.Sequential:
    """Build five linear layers without activations, in order; KeyError names a missing weight.

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
