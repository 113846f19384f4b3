"""A frozen network in few bits: the numbers by hand, then every family under a LoRA."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import norm
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from inversion_dpo.models.base import ModelError, identity, network_of
from inversion_dpo.models.loading import adapt, load_pipeline
from inversion_dpo.models.lora import add_lora
from inversion_dpo.models.quantized import NF4, QuantizedLinear, quantize
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.fields import ModelConfig, PolicyConfig
from inversion_dpo.training.policy import LoraPolicy
from tests.slow import slow_but
from tools.tiny.pipelines import FAMILIES

KINDS = ["int8", "fp8", "nf4"]
ERROR = {"int8": 0.02, "fp8": 0.1, "nf4": 0.4}  # of a tiny network's prediction
LATENTS = {"flux2": (128, 4, 4), "sana": (32, 2, 2), "wan-5b": (48, 4, 4), "sd": (4, 8, 8)}


def test_nf4_has_the_quantiles_of_the_normal_distribution():
    """Appendix E of the paper: 8 levels below 0 and 9 above, evenly spaced in probability."""
    offset = 0.9677083
    above, below = (norm.ppf(np.linspace(offset, 0.5, n)[:-1]) for n in (9, 8))
    levels = np.sort(np.concatenate([above, [0], -below]))
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=1e-6)


def test_numbers_by_hand():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[127.0, 1.4, -2.6, 0.0], [0.0, 0.0, 0.0, 0.0]])
    held = QuantizedLinear(layer, "int8")
    assert held.weight.tolist() == [[127.0, 1.0, -3.0, 0.0], [0.0] * 4]
    layer.weight.data = torch.tensor([[448.0, 1.06, -17.0, 0.0], [0.0] * 4])  # steps 1/8 and 2
    assert QuantizedLinear(layer, "fp8").weight.tolist() == [[448.0, 1.0, -16.0, 0.0], [0.0] * 4]
    layer.weight.data = 3 * torch.tensor([NF4[:4], NF4[-4:]]) + 1e-3
    torch.testing.assert_close(
        QuantizedLinear(layer, "nf4").weight,
        torch.tensor([NF4[:4], NF4[-4:]]) * 3.001,
        rtol=1e-3,
        atol=0,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_zeros_stays_zero(kind, dtype):
    layer = nn.Linear(64, 2, dtype=dtype)
    layer.weight.data.zero_()
    assert QuantizedLinear(layer, kind).weight.tolist() == [[0.0] * 64] * 2


@pytest.mark.parametrize(
    "family", slow_but(["sd3", "qwen-image"], ["sdxl", "sd3", "flux2-klein", "qwen-image"])
)
def test_text_encoders_in_few_bits_say_nearly_the_same(family, tiny):
    """CLIP, T5 and language models: int8 is near, nf4 is farther; the network stays whole."""
    conditions = {}
    for kind in (None, "int8", "nf4"):
        pipeline = load_pipeline(ModelConfig(str(tiny(family)), quantize_text=kind))
        made = adapt(pipeline, 64)
        held = [m for m in pipeline.text_encoder.modules() if isinstance(m, QuantizedLinear)]
        assert bool(held) == (kind is not None)
        assert not any(
            isinstance(m, QuantizedLinear) for m in pipeline.components[made.component].modules()
        )
        with torch.no_grad():
            told = made.condition(["a small red star"])
        conditions[kind] = torch.cat([t.float().flatten() for t in told.values()])
    whole = conditions[None]
    away = {k: float((v - whole).norm() / whole.norm()) for k, v in conditions.items() if k}
    assert 0 < away["int8"] < 0.1 and away["int8"] < away["nf4"] < 1.5, away


def test_trajectories_in_few_bits_have_caches_of_their_own():
    """A cache's key holds the identity of the frozen weights."""
    torch.manual_seed(0)
    plain = nn.ModuleList([nn.Sequential(nn.Linear(64, 8))])
    found = {identity([plain])}
    for kind in KINDS:
        network = copy.deepcopy(plain)
        network[0][0] = QuantizedLinear(network[0][0], kind)
        found.add(identity([network]))
    assert len(found) == 4


def test_a_value_that_is_not_finite_is_not_hidden():
    layer = nn.Linear(64, 1)
    layer.weight.data[0, 3] = torch.inf
    assert all(not QuantizedLinear(layer, kind).weight.isfinite().all() for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_weight(kind, dtype):
    """And no multiplied-out weight is kept for the way back. 100 x 33 ends within a block."""
    torch.manual_seed(0)
    held = QuantizedLinear(nn.Linear(33, 100, dtype=dtype), kind)
    x, kept = torch.randn(2, 5, 33, dtype=dtype, requires_grad=True), []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = held(x)
    y.square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    plain = nn.functional.linear(expected, held.weight, held.bias)
    plain.square().sum().backward()
    assert torch.equal(y, plain) and max(kept, default=0) < held.weight.numel()
    torch.testing.assert_close(x.grad, expected.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert held(x.float()).dtype == torch.bfloat16
    held.to(torch.float32)  # what is stored is no number
    assert held.stored.dtype == torch.uint8


def network(tiny, family, kind=None):
    m = ModelConfig(str(tiny(family)), quantize=kind, t5=family != "sd3-no-t5")
    return adapt(load_pipeline(m), 128 if family.startswith("sd2") else 64, 3.5)


@pytest.mark.parametrize(
    ("family", "kind"),
    slow_but(
        [("z-image", "int8"), ("sdxl", "fp8"), ("wan", "nf4")],
        [(f, k) for f in FAMILIES for k in KINDS],
    ),
)
def test_a_lora_over_few_bits(family, kind, tiny):
    """Near the whole network; with the adapters off it is the reference; every adapter moves."""
    plain, few = network(tiny, family), network(tiny, family, kind)
    shape = next((s for f, s in LATENTS.items() if family.startswith(f)), (16, 8, 8))
    shape = (16, 8, 8) if family.startswith("sd3") else shape
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    t = plain.schedule.timesteps[500].expand(1)
    source = [Image.new("RGB", (64, 64), "green")]
    condition = plain.condition(["a small red star"], *[source] * (plain.edits == "reads"))
    if family == "sdxl":
        condition["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        whole = plain.predict(network_of(plain), x, t, condition)
        base = few.predict(network_of(few), x, t, condition)
    assert 0 < (base - whole).norm() / whole.norm() < ERROR[kind]
    policy = LoraPolicy(few, PolicyConfig(rank=4, alpha=4), 0)
    under = [m for m in policy.network.modules() if isinstance(m, QuantizedLinear)]
    assert under and all(not p.requires_grad for m in under for p in m.parameters())
    p = few.predict(policy.network, x, t, condition)
    assert torch.equal(p, base)  # B is zero
    p.square().sum().backward()
    ups = {n: p for n, p in policy.trainable().items() if "lora_B" in n}
    idle = [n for n, p in ups.items() if p.dtype != torch.float32 or not p.grad.any()]
    assert not idle or not family.startswith("z")  # at 64 pixels a UNet's inner query is idle


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_what_is_offloaded_stays_in_main_memory(kind):
    """The meta device stands for a card: what computes goes there, the weights are copied."""
    layer = nn.Linear(64, 8)
    held = QuantizedLinear(layer, kind, offload=True)
    whole = held.weight.clone()
    assert kind or torch.equal(whole, layer.weight)
    held.to("meta")
    assert {p.device.type for p in held.held().values()} == {"cpu"}
    assert {held.bias.device.type, held.weight.device.type} == {"meta"}
    held.bias = None
    assert torch.equal(held.to_empty(device="cpu").weight, whole)
    if kind is None:  # the same weights, so the same cache
        nets = [nn.ModuleList([nn.Sequential(m)]) for m in (nn.Linear(64, 8, bias=False), held)]
        nets[0][0][0].weight.data = whole
        assert identity(nets[:1]) == identity(nets[1:])


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    slow_but([("sdxl", True), ("z-image", False)], product(["sdxl", "z-image"], [False, True])),
)
def test_offloading_changes_no_bit_of_a_training_step(family, checkpointing, tiny):
    """A pair, as in training: on some processors the sums of one image alone round otherwise."""
    found = []
    for offload in (False, True):
        model = adapt(load_pipeline(ModelConfig(str(tiny(family)), offload=offload)), 64)
        policy = LoraPolicy(model, PolicyConfig(rank=4, alpha=4), 0)
        away = [m for m in policy.network.modules() if isinstance(m, QuantizedLinear)]
        texts = [isinstance(m, QuantizedLinear) for m in model.pipeline.text_encoder.modules()]
        assert bool(away) == any(texts) == offload and all(m.offload for m in away)
        if checkpointing:
            policy.network.enable_gradient_checkpointing()
        torch.manual_seed(0)
        for parameter in policy.trainable().values():
            nn.init.normal_(parameter, std=0.1)
        x = torch.randn(2, *(LATENTS["sd"] if family == "sdxl" else (16, 8, 8)))
        condition = model.condition(["a small red star"] * 2)
        if family == "sdxl":
            condition["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        t = model.schedule.timesteps[500].expand(2)
        loss = model.predict(policy.network.train(), x, t, condition).square().mean()
        loss.backward()
        found.append([loss, *(p.grad for p in policy.trainable().values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sum(bool(gradient.any()) for gradient in found[0]) > 8


def test_a_network_without_such_layers_is_refused(tiny):
    pipe = load_pipeline(ModelConfig(str(tiny("z-image"))))
    with pytest.raises(ModelError, match="Embedding has no linear .*leave out model.quantize"):
        network = nn.Embedding(2, 2)
        network.dtype = pipe.transformer.dtype
        quantize(network, "int8")


def test_layers_outside_the_blocks_and_in_another_precision_stay(tiny):
    pipe = load_pipeline(ModelConfig(str(tiny("z-image"))))
    kept = pipe.transformer.layers[0].attention.to_q.double()
    quantize(pipe.transformer, "int8")
    kinds = {n: type(m) for n, m in pipe.transformer.named_modules()}
    assert type(kept) is nn.Linear and kinds["layers.0.attention.to_k"] is QuantizedLinear
    assert kinds["layers.0.attention.to_out.0"] is QuantizedLinear
    assert all(kinds[n] is not QuantizedLinear for n in kinds if ".0" not in n and ".1" not in n)
    assert pipe.transformer.dtype == torch.float32


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["policy.kind=full"], "model.quantize=nf4 .*cannot be trained: set policy.kind=lora"),
        (["policy.merge=true"], "model.quantize=nf4 .*set policy.merge=false"),
    ],
)
def test_what_few_bits_cannot_do_is_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["model.quantize=nf4", *more])
    with pytest.raises(ConfigError, match="model.quantize_text=nf4 keeps.*(null|false)"):
        load_config(None, ["model.quantize_text=nf4", *more])
    with pytest.raises(
        ConfigError, match="model.offload=true keeps .*in main memory.*=(lora|false)"
    ):
        load_config(None, ["model.offload=true", *more])


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [({"quantize": "int8"}, "quantize=null"), ({"offload": True}, "offload=false")],
)
def test_a_lokr_over_few_bits_is_refused(tiny, tmp_path, setting, remedy):
    """Its change would be added to a copy, and lost in silence."""
    pipe = load_pipeline(ModelConfig(str(tiny("z-image")), **setting))
    layer = pipe.transformer.layers[0].attention.to_q
    key = "transformer.layers.0.attention.to_q.lokr_w"
    size = layer.weight.shape
    save_file(
        {f"{key}1": torch.ones(1, 1), f"{key}2": torch.ones(size)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ModelError, match=f"set model.{remedy}"):
        add_lora(pipe, str(tmp_path / "x.safetensors"))
