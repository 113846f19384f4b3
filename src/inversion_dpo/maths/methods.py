"""Name the methods: each is a loss, a path and a target. Words only, without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

COMMON = frozenset({"labels", "reference", "beta", "safeguard", "terms"})
LINKED = COMMON | {"link", "label_smoothing", "soft_labels", "gap"}
# Which settings each loss looks at.
USES: dict[str, frozenset[str]] = {
    "dpo": LINKED,
    "dpo_bounded": LINKED,
    "dpo_released": LINKED,
    "smpo": COMMON | {"soft_labels"},
    "dspo": COMMON - {"terms"},
    "mapo": frozenset({"labels", "beta"}),
    "dmpo": LINKED - {"link"},
    "nft": frozenset({"labels", "reference", "beta", "soft_labels"}),
    "kto": COMMON | {"liked_share", "gap"},
    "sft": frozenset({"labels"}),
    "denoising": frozenset(),
}

ADAPTED = frozenset({"dpo", "smpo", "dmpo"})  # losses of a logit in proportion to beta
ALONE = frozenset({"kto", "nft", "sft", "denoising"})  # losses of single images

# The beta of a loss where none is given; sources: docs/explanation/objectives.md.
BETAS = {
    "dpo": 2000.0,
    "dpo_bounded": 100.0,
    "dpo_released": 2000.0,
    "smpo": 2000.0,
    "dspo": 0.001,
    "mapo": 0.1,
    "dmpo": 6000.0,
    "nft": 1.0,
    "kto": 1000.0,
}


SCALED = frozenset({"dpo", "dpo_bounded", "dpo_released", "smpo", "dmpo", "kto"})


def carried_beta(beta: float, before: str, loss: str) -> float | None:
    """Carry a beta over to another loss.

    Where both multiply errors (``SCALED``) it stays as large beside the usual one: errors of a
    velocity are of another scale than those of noise, and a preset's beta knows it. DSPO's, MaPO's
    and NFT's are weights, which know no scale: they take the usual one.

    Args:
        beta: of the loss before.
        before: a key of ``USES``, as is ``loss``.
        loss: that it is carried to.

    Returns:
        The other loss's beta, or None if one of them has none.
    """
    if before not in BETAS or loss not in BETAS:
        return None
    usual = BETAS[loss]
    return float(f"{usual * beta / BETAS[before]:.6g}") if {before, loss} <= SCALED else usual


# Where a state x_t comes from.
PATHS = {
    "trajectory": "a state of the image's inversion under the reference, from the cache",
    "noise": "the image with fresh noise, which the two images of a pair share",
    "stepped": "the image with fresh noise one level below, and one inversion step from there",
    "line": "the image with the noise that its inversion recovered, at any level",
    "known": "the image with the noise that it was sampled from, drawn again from its seed",
    "released": "every state of an inversion as the authors' script runs it, at once",
    "policy": "the image inverted under the policy as it is, at every step (DDIM-InPO)",
    "renoise": "the same along the mean of two predictions (SmPO)",
}


STORED = ("trajectory", "released")  # paths whose states and predictions are in the cache
ENDPOINTS = {"line": "recovered", "known": "known"}  # paths whose noise is, one an image


@dataclass(frozen=True)
class Method:
    """A loss, the origin of its states, and the target of the prediction there."""

    loss: str
    path: str
    target: str = "x0"

    @property
    def inverts(self) -> bool:
        """Whether the pairs are inverted before the training."""
        return self.path in (*STORED, "line")


METHODS: dict[str, Method] = {
    "inversion_dpo": Method("dpo", "trajectory"),
    "inversion_dpo_released": Method("dpo_released", "released", "reference"),
    "diffusion_dpo": Method("dpo", "noise"),
    "inpo": Method("dpo", "policy"),
    "smpo": Method("smpo", "renoise"),
    "dspo": Method("dspo", "noise"),
    "mapo": Method("mapo", "noise"),
    "dmpo": Method("dmpo", "noise"),
    "nft": Method("nft", "noise"),
    "kto": Method("kto", "noise"),
    "sft": Method("sft", "noise"),
    "denoising": Method("denoising", "noise"),
}


def method_of(
    name: str, *, loss: str | None = None, path: str | None = None, target: str | None = None
) -> Method:
    """Return a row of METHODS, with another loss, path or target if one is given.

    Args:
        name: one of METHODS.
        loss: one of USES instead of the method's.
        path: one of PATHS instead of the method's.
        target: x0, transition or reference instead of the method's.

    Raises:
        ValueError: a target that the path does not have.
    """
    given = {"loss": loss, "path": path, "target": target}
    method = replace(METHODS[name], **{k: v for k, v in given.items() if v is not None})
    if method.path == "released" and method.target != "reference":
        raise ValueError(
            "objective.path=released has states without noise, from which only the reference's "
            f"prediction can be a target, not {method.target}: set objective.target=reference"
        )
    if method.path not in STORED and method.target != "x0":
        raise ValueError(
            f"objective.target={method.target} needs objective.path=trajectory: a state of path "
            f"{method.path} has no stored neighbour or prediction; set objective.target=x0"
        )
    if method.loss == "dpo_released" and method.target != "reference":
        raise ValueError(
            "objective.loss=dpo_released reproduces the sign of the released script and is defined "
            f"for objective.target=reference only, not for {method.target}"
        )
    return method
