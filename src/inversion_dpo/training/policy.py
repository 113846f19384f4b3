"""What is trained, and the frozen reference beside it.

``save`` takes the trainable tensors as ``whole`` where FSDP has cut those of the network.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from inversion_dpo.models.base import DiffusionModel, ModelError, network_of
from inversion_dpo.models.graph_encoder import SceneGraphEncoder
from inversion_dpo.models.graph_model import save_encoder
from inversion_dpo.models.lora import merge_lora
from inversion_dpo.models.parts import save_pipeline
from inversion_dpo.run.disk import steady_header
from inversion_dpo.run.fields import Config, PolicyConfig, TrainingConfig
from inversion_dpo.run.sharded import settle


class NarrowLinear(nn.Linear):
    """A LoRA's matrix: float32 for the optimizer, rounded to its input's precision at each use."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the rounded weight."""
        return F.linear(input, self.weight.to(input.dtype))


class NarrowConv2d(nn.Conv2d):
    """The same of a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the rounded weight."""
        return self._conv_forward(input, self.weight.to(input.dtype), None)


NARROW: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NarrowLinear,
    nn.Conv2d: NarrowConv2d,
}


@contextmanager
def having(
    network: nn.Module, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[nn.Module]:
    """Give a network's parameters these values as long as the context lasts; of FSDP its parts."""
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assign(parameters, values)
    try:
        yield network
        settle(network)
    finally:
        assign(parameters, own)


@torch.no_grad()
def assign(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


class LoraPolicy:
    """Low-rank adapters on the network; the reference is the same weights, adapters off.

    ``policy.target_modules``, the family's own if there are none: name endings as peft takes them;
    a single entry that begins with ``^`` is one pattern for whole names. With ``policy.dora`` the
    weights' magnitudes are trained too (Liu et al., 2024, https://arxiv.org/abs/2402.09353).
    Adapters are float32 whatever the frozen weights are. Under autocast, which rounds weights and
    inputs alike, peft does not widen their inputs first: the same bits, without the copies.

    Raises:
        ModelError: no layer has such a name.
    """

    def __init__(
        self, model: DiffusionModel, p: PolicyConfig, seed: int, *, autocast: bool = False
    ) -> None:
        self.model, self.network = model, network_of(model)
        target_modules = p.target_modules or list(model.targets)
        pattern = len(target_modules) == 1 and target_modules[0].startswith("^")
        targets = target_modules[0] if pattern else list(target_modules)
        layers = [f".{name}" for name, _ in self.network.named_modules()]
        for end in () if pattern else p.target_modules or ():
            if not any(layer.endswith(f".{end}") for layer in layers):
                raise ModelError(f"policy.target_modules: no layer's name ends in {end!r}")
        config = LoraConfig(
            r=p.rank,
            lora_alpha=p.alpha,
            target_modules=targets,
            exclude_modules=model.unreached,
            use_dora=p.dora,
        )
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.network.add_adapter(config)  # type: ignore[operator]
        except ValueError as error:
            raise ModelError(f"policy.target_modules={target_modules}: {error}") from error
        # Found once: a walk over all modules takes as long as a small step. Parameters are looked
        # up in them each time, for FSDP2 puts others in their place.
        self.layers = {n: m for n, m in self.network.named_modules() if "lora_" in n}
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()
        narrow = p.adapter_dtype == "model"
        for module in self.layers.values() if narrow else ():
            module.__class__ = NARROW.get(type(module), type(module))
        for module in self.network.modules():
            if isinstance(module, BaseTunerLayer):  # DoRA multiplies outside autocast's operations
                module.cast_input_dtype_enabled = p.dora or not (autocast or narrow)
                widen_magnitudes(module)

    def trainable(self) -> dict[str, nn.Parameter]:
        """List trainable parameters by name."""
        layers = self.layers.items()
        return {f"{n}.{k}": p for n, m in layers for k, p in m.named_parameters(recurse=False)}

    @contextmanager
    def reference(self, network: Any) -> Iterator[nn.Module]:
        """Give the same network with its adapters off."""
        self.network.disable_adapters()  # type: ignore[operator]
        for parameter in self.trainable().values():
            parameter.requires_grad_(True)  # peft turns it off: DDP and FSDP want it unchanged
        try:
            yield network
        finally:
            self.network.enable_adapters()  # type: ignore[operator]

    def save(self, folder: Path, whole: Mapping[str, Tensor] | None = None) -> None:
        """Write ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights(folder)``."""
        part = self.model.component
        layers = get_peft_model_state_dict(self.network, state_dict=whole)
        weights = {f"{part}_lora_layers": layers}
        about: dict[str, Any] = self.network.peft_config["default"].to_dict()  # type: ignore
        if not isinstance(about["target_modules"], str):
            about["target_modules"] = sorted(about["target_modules"])
        settings = {f"{part}_lora_adapter_metadata": about}  # else alpha = rank would be assumed
        self.model.pipeline.save_lora_weights(
            save_directory=folder, safe_serialization=True, **weights, **settings
        )
        steady_header(folder / "pytorch_lora_weights.safetensors")

    def merge(self, folder: Path) -> None:
        """Add the adapter to the weights and write the whole pipeline; ends the training."""
        merge_lora(self.model.pipeline)
        save_pipeline(self.model.pipeline, folder)


def widen_magnitudes(layer: BaseTunerLayer) -> None:
    """Compute a new DoRA's magnitudes in float32, in which it takes the weights' norms.

    peft rounds them to the frozen weights' precision, so that the policy were not the reference.
    """
    for name, dora in getattr(layer, "lora_magnitude_vector", {}).items():
        dora.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[name].weight,
            lora_B=layer.lora_B[name].weight,
            scaling=layer.scaling[name],
        )


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's weights."""
    return next(network.parameters()).device


class FullPolicy:
    """Every weight of the network; the reference is a frozen copy.

    The copy waits in main memory, for cached predictions need none. Whoever asks for it first
    brings it to the network's device, where it stays.
    """

    def __init__(self, model: DiffusionModel) -> None:
        self.model, self.network = model, network_of(model)
        self.frozen = copy.deepcopy(self.network).requires_grad_(False).eval()
        if device_of(self.network).type != "meta":  # without weights, to count them
            self.frozen.to("cpu")
        unreached = re.compile(model.unreached or "$.")
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not unreached.match(name))

    def trainable(self) -> dict[str, nn.Parameter]:
        """List trainable parameters by name."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    @contextmanager
    def reference(self, network: Any) -> Iterator[nn.Module]:
        """Give the frozen copy, whatever the network."""
        if device_of(self.frozen) != device_of(self.network):
            self.frozen.to(device_of(self.network))
        yield self.frozen

    def save(self, folder: Path, whole: Mapping[str, Tensor] | None = None) -> None:
        """Write a whole pipeline folder for ``DiffusionPipeline.from_pretrained(folder)``."""
        pipeline, network = self.model.pipeline, self.network
        if whole is not None:
            network = copy.deepcopy(self.frozen)
            network.load_state_dict(whole, strict=False)
        try:
            pipeline.register_modules(**{self.model.component: network})
            save_pipeline(pipeline, folder)
        finally:
            pipeline.register_modules(**{self.model.component: self.network})

    def merge(self, folder: Path) -> None:
        """Do the same: there is no adapter."""
        self.save(folder)


class WithEncoder(nn.Module):
    """A UNet and the scene-graph encoder that it attends to; called as the UNet is."""

    def __init__(self, unet: nn.Module, encoder: SceneGraphEncoder) -> None:
        super().__init__()
        self.unet, self.encoder = unet, encoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the UNet."""
        return self.unet(*args, **kwargs)

    def enable_gradient_checkpointing(self) -> None:
        """Ask the UNet for it."""
        self.unet.enable_gradient_checkpointing()  # type: ignore[operator]


class SceneGraphPolicy:
    """The encoder of scene graphs alone; the reference is the same UNet without any graph."""

    def __init__(self, model: DiffusionModel, base: str) -> None:
        self.model, self.base = model, base
        self.encoder: SceneGraphEncoder = model.pipeline.scene_graph.requires_grad_(True)
        self.network = WithEncoder(network_of(model), self.encoder)

    def trainable(self) -> dict[str, nn.Parameter]:
        """List trainable parameters by name."""
        return dict(self.encoder.named_parameters())

    @contextmanager
    def reference(self, network: Any) -> Iterator[nn.Module]:
        """Give the same network, which sees no graph as long as the context lasts."""
        with self.encoder.off():
            yield network

    def save(self, folder: Path, whole: Mapping[str, Tensor] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``, which ``model.scene_graph`` takes."""
        save_encoder(self.encoder, folder, self.base, whole)

    def merge(self, folder: Path) -> None:
        """Refuse: there is nothing to be merged."""
        raise ModelError("a scene-graph encoder cannot be merged: set policy.merge=false")


Policy = LoraPolicy | FullPolicy | SceneGraphPolicy


def attach(model: DiffusionModel, config: Config) -> Policy:
    """Attach what is trained to the frozen model; the network is switched to training as is."""
    p = config.policy
    if p.kind == "full":
        return FullPolicy(model)
    if p.kind == "scene_graph":
        path = Path(config.model.path)  # a folder is not named to others
        return SceneGraphPolicy(model, path.name if path.expanduser().exists() else str(path))
    autocast = config.training.mixed_precision != "no"
    return LoraPolicy(model, p, config.training.seed, autocast=autocast)


def make_optimizer(t: TrainingConfig, parameters: list[nn.Parameter]) -> Any:
    """AdamW, 8-bit AdamW or Adafactor at a fixed rate; ModelError if it is not installed.

    On a GPU AdamW is torch's fused one: one kernel for many tensors.
    """
    rate, decay = t.learning_rate, t.weight_decay
    if t.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise ModelError(
                "training.optimizer=adamw8bit needs `pip install bitsandbytes` and a GPU; or set "
                "training.optimizer=adafactor, which needs little memory too"
            ) from error
        return bitsandbytes.optim.AdamW8bit(parameters, lr=rate, weight_decay=decay)
    if t.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        fixed = {"scale_parameter": False, "relative_step": False}
        return Adafactor(parameters, lr=rate, weight_decay=decay, **fixed)
    fused = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
