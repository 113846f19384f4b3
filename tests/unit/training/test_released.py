"""The released form against the authors' formula, from states to loss and gradient.

MIGHTYEZ/Inversion-DPO@3e2af58, train_ddim.py: evaluated here a second time, with the pipeline's own
UNet and nothing of this package but the encoded images and prompts.
"""

import pytest
import torch
from diffusers import DDIMScheduler

from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.training.generators import generator_for
from inversion_dpo.training.plan import released_weights
from inversion_dpo.training.step import backward, heldout, losses
from tests.sessions import set_up

N, BETA, GUIDANCE = 5, 5.0, 2.0  # logits of about 1


@pytest.fixture(scope="module")
def session(tiny, pair_file, tmp_path_factory):
    """Full weights of a tiny SDXL, moved away from the reference by a seeded kick."""
    config = load_config(
        None,
        [
            f"model.path={tiny('sdxl')}",
            "model.resolution=32",
            f"data.pairs={pair_file}",
            "data.limit=6",
            "data.allow_giveaways=true",
            "objective.name=inversion_dpo_released",
            f"objective.beta={BETA}",
            f"objective.guidance_scale={GUIDANCE}",
            f"inversion.guidance_scale={GUIDANCE}",
            f"inversion.steps={N}",
            "policy.kind=full",
            "training.batch_size=2",
        ],
    )
    made = set_up(config, tmp_path_factory.mktemp("released"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in made.policy.trainable().values():
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    return made


def guided(unet, x, t, condition, empty):
    """The script's prediction: both halves told t, the guided sum of them."""
    both = {name: torch.cat([empty[name], value]) for name, value in condition.items()}
    text = both.pop("encoder_hidden_states")
    found = unet(torch.cat([x, x]), t, encoder_hidden_states=text, added_cond_kwargs=both).sample
    without, under = found.chunk(2)
    return without + GUIDANCE * (under - without)


def authors(session, pairs):
    """Loss of each pair, a graph through all states; the loop of the script, in its order."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(N)
    ascending = scheduler.timesteps.flip(0)
    bar = scheduler.alphas_cumprod

    def level(t):
        return bar[t] if t >= 0 else scheduler.final_alpha_cumprod

    found = []
    for pair in pairs:
        condition = session.cache.condition([pair])
        empty = condition | {k: v.expand(2, *v.shape[1:]) for k, v in session.cache.empty.items()}
        x, total = session.cache.of_images("clean", [pair]), torch.zeros(2)  # winner, loser
        for t in ascending:
            with torch.no_grad(), session.policy.reference(session.network) as reference:
                e_ref = guided(reference, x, t, condition, empty)
            e = guided(session.network, x, t, condition, empty)
            total = total + (e - e_ref).square().flatten(1).mean(1) / (2 * bar[t])
            low, high = level(t - 1000 // N), level(t)
            x_0 = (x - (1 - low).sqrt() * e_ref) / low.sqrt()
            x = high.sqrt() * x_0 + (1 - high).sqrt() * e_ref
        winner, loser = total / N
        found.append(-torch.nn.functional.logsigmoid(0.5 * BETA * (winner - loser)))
    return torch.stack(found)


def test_loss_and_gradient_are_the_scripts(session):
    pairs = [3, 0]
    wanted = authors(session, pairs)
    batch = [(pair, 0) for pair in pairs for _ in range(N)]
    generators = [generator_for(0, k) for k in range(len(batch))]
    output, _, evaluations = losses(session, batch, generators)
    ours = output.loss
    assert evaluations == 2 * 3  # of the policy, under guidance; the reference is in the cache
    torch.testing.assert_close(ours.reshape(2, N), wanted[:, None].expand(2, N), rtol=1e-4, atol=0)
    assert (wanted - torch.tensor(2.0).log()).abs().min() > 1e-3  # the kick is seen
    assert 0.05 < wanted.min() and wanted.max() < 5  # where the sigmoid bends

    tensors = list(session.policy.trainable().values())
    theirs = torch.autograd.grad(wanted.mean(), tensors, allow_unused=True)
    mine = torch.autograd.grad(ours.mean(), tensors, allow_unused=True)
    least = 1e-4 * max(float(b.abs().max()) for b in theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=least)


def test_a_step_and_its_parts_have_one_gradient(session):
    def gradient(accumulation):
        session.optimizer.zero_grad()
        plan = session.plan
        object.__setattr__(plan, "accumulation", accumulation)
        rows, blamed = backward(session, 0)
        object.__setattr__(plan, "accumulation", 1)
        assert all(found.isfinite().all() for _, found in blamed)
        assert sum(share for share, _ in rows) == pytest.approx(1)
        return [t.grad.clone() for t in session.policy.trainable().values() if t.grad is not None]

    whole, parts = gradient(1), gradient(2)
    least = 1e-4 * max(float(b.abs().max()) for b in whole)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=least)


def test_held_out_pairs_are_measured_over_all_states(session):
    row = heldout(session)
    assert row["heldout_pairs"] == len(session.heldout_pairs)
    batch = [(session.heldout_pairs[0], 0)] * N
    _, errors, _ = losses(session, batch, [generator_for(1, k) for k in range(N)])
    assert row["heldout_winner_error"] == pytest.approx(errors.winner[0].item(), rel=1e-4)


def test_grid_and_weights_by_hand(session):
    grid, bar = session.cache.grid, session.model.schedule.levels.alpha.square()
    assert grid.timesteps.tolist() == [0, 0, 200, 400, 600, 800]  # told
    wanted = bar[torch.tensor([0, 0, 0, 200, 400, 600])]
    torch.testing.assert_close(grid.levels.alpha.square(), wanted)
    weights = released_weights(session.model.schedule, grid)
    torch.testing.assert_close(weights[5].item(), 0.5 / bar[800].item(), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights[1].item(), 0.5 / bar[0].item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("inversion.spacing=even", "has no effect"),
        ("inversion.keep=2", "has no effect"),
        ("objective.t_min=0.2", "has no effect"),
        ("objective.weighting=min_snr", "has no effect"),
        ("objective.target=x0", "defined for objective.target=reference only"),
    ],
)
def test_what_the_script_does_not_have_is_refused(given, what):
    from inversion_dpo.training.effects import load_checked

    with pytest.raises(ConfigError, match=what):
        load_checked(None, ["objective.name=inversion_dpo_released", given])
