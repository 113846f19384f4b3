"""Every fast path beside the plain one: the same numbers, or the stated error."""

import copy
import shutil
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from inversion_dpo.models import blocks
from inversion_dpo.models.base import Framing, ModelError, identity, network_of
from inversion_dpo.models.blocks import (
    LONG,
    check_compile,
    compile_blocks,
    one_length,
    seconds_compiling,
)
from inversion_dpo.models.loading import adapt, channels_last, load_pipeline
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.faults import Parts
from inversion_dpo.run.fields import ModelConfig, PolicyConfig, TrainingConfig
from inversion_dpo.training import checkpoint
from inversion_dpo.training.policy import FullPolicy, LoraPolicy, make_optimizer
from inversion_dpo.training.step import step
from tests.by_hand import make_plan, make_session, write_cache
from tests.slow import slow_but

PROMPTS = ["a small red star", "a large blue cross"]


def of_family(tiny, family, dtype="float32"):
    """The adapter, and a call of its network on two random latents."""
    model = adapt(load_pipeline(ModelConfig(str(tiny(family)), dtype=dtype)), 64)
    framing = model.framing([Framing((64, 64), (0, 0), (64, 64))] * 2)
    condition = model.condition(PROMPTS) | framing
    shape = model.encode(torch.zeros(1, 3, 64, 64)).shape[1:]
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    t = model.schedule.timesteps[len(model.schedule.timesteps) // 2].expand(2)
    return model, lambda network: model.predict(network, x, t, condition)


def moved(policy):
    """The policy, away from the reference."""
    draw = torch.Generator().manual_seed(2)
    for parameter in policy.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return policy


def test_a_full_policys_frozen_copy_waits_in_main_memory_until_it_is_asked(tiny):
    model, _ = of_family(tiny, "sdxl")
    policy = FullPolicy(model)
    where = "meta"  # a device that every machine has
    model.pipeline.unet.to(where)
    assert {str(p.device) for p in policy.frozen.parameters()} == {"cpu"}
    with policy.reference(None) as frozen:
        assert {str(p.device) for p in frozen.parameters()} == {where}


@pytest.mark.parametrize("family", slow_but(["flux"], ["sdxl", "flux"]))
def test_under_autocast_adapters_take_inputs_as_they_are_to_the_bit(family, tiny):
    found, kept = [], []
    for autocast in (False, True):
        model, predict = of_family(tiny, family, "bfloat16")
        policy = moved(LoraPolicy(model, PolicyConfig(rank=4, alpha=4), 0, autocast=autocast))
        sizes = {}

        def keep(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16):
                prediction = predict(policy.network)
            loss = prediction.square().mean()
            kept.append(sum(sizes.values()))
        loss.backward()
        found.append({n: p.grad for n, p in policy.trainable().items()} | {"": prediction})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    assert kept[1] < kept[0]  # and less memory: no widened copy of every input


def test_dora_keeps_its_widened_inputs(tiny):
    model, _ = of_family(tiny, "sd15")
    how = PolicyConfig(rank=2, alpha=2, dora=True)
    layers = LoraPolicy(model, how, 0, autocast=True).network.modules()
    assert {getattr(layer, "cast_input_dtype_enabled", True) for layer in layers} == {True}


def test_a_dora_starts_as_the_reference_in_bfloat16(tiny):
    """Layers of convolutions too: peft rounds the magnitudes, by up to 0.4 %."""
    model, predict = of_family(tiny, "sd15", "bfloat16")
    how = PolicyConfig(rank=2, alpha=2, dora=True, target_modules=["to_q", "to_v", "conv1"])
    policy = LoraPolicy(model, how, 0)
    with torch.no_grad():
        ours = predict(policy.network)
        with policy.reference(policy.network) as reference:
            assert torch.equal(predict(reference), ours)
    magnitudes = [p for n, p in policy.trainable().items() if "magnitude" in n]
    assert magnitudes and {p.dtype for p in magnitudes} == {torch.float32}
    assert all(p.requires_grad for p in magnitudes)


def test_channels_last_changes_the_layout_alone(tiny):
    model, predict = of_family(tiny, "sdxl")
    network = network_of(model)
    with torch.no_grad():
        plain, before = predict(network), identity([network])
        names = list(network.state_dict())
        channels_last(model.pipeline)
        again = predict(network)
    assert not network.conv_in.weight.is_contiguous()
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
    assert (identity([network]), list(network.state_dict())) == (before, names)
    video = SimpleNamespace(components={"transformer": torch.nn.Conv3d(2, 2, 2)})
    channels_last(video)  # left as it is: there is no such layout


def test_the_fused_optimizer_takes_the_same_steps():
    draw = torch.Generator().manual_seed(0)
    start, gradients = (torch.randn(n, 50, generator=draw) for n in (1, 20))
    plain, fused = (torch.nn.Parameter(start[0].clone()) for _ in range(2))
    t = TrainingConfig(learning_rate=1e-2, weight_decay=1e-2)
    optimizers = make_optimizer(t, [plain]), torch.optim.AdamW([fused], fused=True)
    assert not optimizers[0].param_groups[0]["fused"]  # but on a GPU
    optimizers[1].param_groups[0].update(lr=1e-2, weight_decay=1e-2)
    for gradient in gradients:
        for parameter, optimizer in zip((plain, fused), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_optimizer_resumes_with_its_count_on_the_device(fused, tmp_path, monkeypatch):
    """The "meta" device stands for a GPU; plain AdamW counts on the CPU."""
    save_file({"w": torch.zeros(2)}, tmp_path / "policy.safetensors")
    moments = {"step:w": torch.tensor(3.0), "exp_avg:w": torch.ones(2)}
    save_file(moments, tmp_path / "optimizer.safetensors")
    progress = dict(step=3, seconds=0.0, identity="i", reference="", files={})
    monkeypatch.setattr(checkpoint, "_read_state", lambda folder: dict(progress))
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = SimpleNamespace(state=defaultdict(dict), param_groups=[{"fused": fused}])
    checkpoint.load_checkpoint(tmp_path, {"w": weight}, optimizer, "i")
    assert optimizer.state[weight]["step"].device.type == ("meta" if fused else "cpu")
    assert optimizer.state[weight]["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("state", [{"step": 3}, {"step": 3, "seconds": 0.0, "colour": "red"}])
def test_a_checkpoint_of_another_version_is_named(state, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_read_state", lambda folder: state | {"files": {}})
    with pytest.raises(
        checkpoint.CheckpointError, match="of another version of inversion-dpo .*, or c"
    ):
        checkpoint.load_checkpoint(tmp_path, {}, SimpleNamespace(), "i")
    (tmp_path / "step-000003").mkdir()
    assert checkpoint.best_checkpoint(tmp_path) is None


@pytest.mark.parametrize("method", ["inversion_dpo", "diffusion_dpo", "kto"])
def test_a_step_waits_for_the_device_once(method, tmp_path):
    waited = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name, kwargs = getattr(func, "__name__", ""), kwargs or {}
            to_device = name == "to" and any(isinstance(a, torch.device) for a in args)
            ours = "inversion_dpo" in sys._getframe(1).f_code.co_filename  # torch stays on a device
            if ours and (name in ("cpu", "item") or to_device and not kwargs.get("non_blocking")):
                waited.append(name)
            return func(*args, **kwargs)

    session = make_session(
        write_cache(tmp_path / "cache"), make_plan(method, soft_labels=True, safeguard=True)
    )
    with Watch():
        step(session, 0, 0.1)
    assert waited == ["cpu"]


def test_adapters_in_the_models_precision_have_float32_weights(tiny):
    """To the bit what adapters of bfloat16 compute; their gradients arrive in float32."""
    found = []
    for dtype in ("model", "float32"):
        model, predict = of_family(tiny, "sdxl", "bfloat16")
        p = PolicyConfig(rank=4, alpha=4, adapter_dtype=dtype)
        policy = moved(LoraPolicy(model, p, 0))
        assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
        if dtype == "float32":
            for parameter in policy.trainable().values():
                parameter.data = parameter.data.bfloat16()
        prediction = predict(policy.network)
        prediction.square().mean().backward()
        gradients = {n: p.grad.float() for n, p in policy.trainable().items()}
        assert dtype == "float32" or policy.trainable()[next(iter(gradients))].grad.dtype == (
            torch.float32
        )
        found.append(gradients | {"": prediction.detach()})
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


# ---- compiled blocks


@pytest.mark.parametrize(
    ("family", "dynamic"),
    slow_but(
        [("sd3", False), ("z-image", None)], [("sdxl", False), ("sd3", False), ("z-image", None)]
    ),
)
def test_blocks_are_compiled_in_their_place(family, dynamic, tiny, monkeypatch):
    """Where texts have many lengths, torch makes one form for all; else each size has its own."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda call, **how: asked.append(how) or call)
    model, _ = of_family(tiny, family)
    network = network_of(model)
    names, fixed = list(network.state_dict()), one_length(model.empty(), model.condition([LONG]))
    compile_blocks(network, "default", fixed)
    assert asked and all(how == {"mode": "default", "dynamic": dynamic} for how in asked)
    assert list(network.state_dict()) == names
    assert all(b._compiled_call_impl is None for b in copy.deepcopy(network).modules())


def test_compilation_that_cannot_be_is_refused(monkeypatch):
    cpu = torch.device("cpu")
    check_compile("default", torch.device("meta"))
    with pytest.raises(ConfigError, match="reduce-overhead .* no effect on this device, cpu"):
        check_compile("reduce-overhead", cpu)
    with pytest.raises(ConfigError, match="not tried with several processes"):
        check_compile("default", cpu, 2)
    monkeypatch.setattr(blocks.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        check_compile("default", cpu)
    with pytest.raises(ConfigError, match="not made for a scene-graph encoder"):
        load_config(None, ["training.compile=default", "policy.kind=scene_graph"])
    with pytest.raises(ModelError, match="Linear repeats no block"):
        compile_blocks(torch.nn.Linear(1, 1), "default", True)


@pytest.mark.slow  # a C++ compiler takes minutes
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile with")
def test_inductor_computes_the_same(tiny):
    """Away from the plain network by rounding: 1e-5 of the largest prediction or gradient."""
    found = []
    for compiled in (False, True):
        model, predict = of_family(tiny, "flux")
        if compiled:
            compile_blocks(network_of(model), "default", True)
        policy = moved(LoraPolicy(model, PolicyConfig(rank=4, alpha=4), 0))
        prediction = predict(policy.network)
        prediction.square().mean().backward()
        found.append({n: p.grad for n, p in policy.trainable().items()} | {"": prediction.detach()})
    for name, value in found[0].items():
        assert (found[1][name] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-6)
    assert seconds_compiling() > 0


# ---- as many as memory takes


@pytest.mark.parametrize(
    ("side", "kind", "most"),
    [(1024, "cpu", 1), (512, "mps", 4), (64, "cpu", 256), (2048, "cpu", 1), (1024, "cuda", 900)],
)
def test_few_pairs_at_once_where_the_system_ends_what_takes_too_much(side, kind, most):
    parts, asked = Parts(), []
    parts.limit((side, side), torch.device(kind))
    parts.of(900, lambda part: asked.append(part.stop - part.start))
    assert asked[0] == most and sum(asked) == 900


def test_half_as_many_where_memory_runs_out():
    asked = []

    def work(part):
        asked.append((part.start, part.stop))
        if part.stop - part.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(part.start, part.stop))

    parts = Parts()
    assert sum(parts.of(10, work), []) == list(range(10))
    assert asked == [(0, 10), (0, 5), (0, 3), (3, 6), (6, 9), (9, 10)]
    assert sum(parts.of(4, work), []) == list(range(4)) and asked[-2:] == [(0, 3), (3, 4)]
    asked.clear()
    with pytest.raises(torch.OutOfMemoryError):
        Parts().of(2, lambda part: work(slice(0, 9)))
    with pytest.raises(RuntimeError, match="MPS"):
        apple = Parts()
        apple.of(2, lambda part: (_ for _ in ()).throw(RuntimeError("MPS backend out of memory")))
    assert apple.most == 1
    with pytest.raises(RuntimeError, match="another"):
        Parts().of(2, lambda part: (_ for _ in ()).throw(RuntimeError("another")))
