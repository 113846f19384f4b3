"""The table of methods, what each loss needs, and small laws of the losses."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inversion_dpo.maths.losses import (
    LOSSES,
    as_pair_errors,
    dpo_logit,
    link_loss,
    pooled,
    residual_overlap,
    safeguarded,
    squared_error,
)
from inversion_dpo.maths.methods import (
    BETAS,
    METHODS,
    PATHS,
    USES,
    Method,
    carried_beta,
    method_of,
)
from inversion_dpo.maths.records import LossSettings

# ---- what is taken from the table


def test_a_method_is_its_row_with_what_is_given():
    assert method_of("kto") == METHODS["kto"]
    kto = method_of("kto", path="trajectory", target="transition")
    assert (kto.loss, kto.path, kto.target) == ("kto", "trajectory", "transition")
    assert method_of("diffusion_dpo", loss="sft").loss == "sft"


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"path": "noise", "target": "transition"}, "needs objective.path=trajectory"),
        ({"path": "policy", "target": "reference"}, "needs objective.path=trajectory"),
        ({"path": "line", "target": "transition"}, "needs objective.path=trajectory"),
        ({"path": "known", "target": "reference"}, "needs objective.path=trajectory"),
        ({"path": "released"}, "not x0: set objective.target=reference"),
        ({"loss": "dpo_released"}, "for objective.target=reference only, not for x0"),
    ],
)
def test_what_does_not_go_together_is_refused(given, what):
    with pytest.raises(ValueError) as error:
        method_of(**{"name": "inversion_dpo"} | given)
    assert what in str(error.value)


def probed(name, **changed):
    """Loss of three made-up pairs, with other errors where given."""
    torch.manual_seed(3)
    made = [0.1 + 0.2 * torch.rand(6, dtype=torch.float64) for _ in range(3)]
    errors = as_pair_errors(made[0], made[1], moved=made[2])
    return LOSSES[name].function(replace(errors, **changed), LossSettings(3.0)).loss


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_says_what_a_loss_depends_on(name):
    """Move the reference, or the baseline, and look whether the loss moves."""
    reference = {k: torch.full((3,), 0.7).double() for k in ("winner_ref", "loser_ref")}
    baseline = {"baseline": torch.full((3,), 0.2).double()}
    for said, changed in (
        (LOSSES[name].reference, reference),
        (LOSSES[name].baseline, baseline),
    ):
        assert torch.equal(probed(name), probed(name, **changed)) != said


# ---- laws


def test_every_loss_has_a_slope_and_no_margin_has_one():
    for name, loss in LOSSES.items():
        policy = torch.tensor([0.2, 0.3], requires_grad=True)
        out = loss.function(as_pair_errors(policy, torch.tensor([0.25, 0.25])), LossSettings(1.0))
        assert not out.margin.requires_grad, name
        out.loss.sum().backward()
        assert (policy.grad[0] > 0) == (name != "dpo_released"), name  # worse winner, more loss


@pytest.mark.parametrize("link", ["sigmoid", "hinge", "ipo"])
def test_links_are_symmetric_in_the_label(link):
    z, p = torch.tensor([-2.0, 0.3, 1.5]), torch.tensor([0.2, 0.9, 1.0])
    torch.testing.assert_close(link_loss(z, p, link), link_loss(-z, 1 - p, link))


def test_links_by_hand():
    z, p = torch.tensor([0.25]), torch.tensor([0.75])
    assert link_loss(z, p, "hinge").item() == pytest.approx(0.75 * 0.75 + 0.25 * 1.25)
    assert link_loss(z, p, "ipo").item() == pytest.approx(0.75 * 0.0625 + 0.25 * 0.5625)
    wanted = 0.75 * math.log(1 + math.exp(-0.25)) + 0.25 * math.log(1 + math.exp(0.25))
    assert link_loss(z, p, "sigmoid").item() == pytest.approx(wanted)
    assert link_loss(torch.tensor([3.0]), torch.tensor([1.0]), "hinge").item() == 0
    assert link_loss(torch.tensor([-3.0]), torch.tensor([0.0]), "hinge").item() == 0


def test_label_smoothing_is_a_softer_label():
    """Smoothing by e of a label p is the loss of a label e + (1 - 2e) p."""
    errors = as_pair_errors(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.2]))
    soft = LossSettings(5.0, label_smoothing=0.2)
    for p in (1.0, 0.6, 0.5):
        found = LOSSES["dpo"].function(replace(errors, preference=torch.tensor([p])), soft)
        wanted = link_loss(dpo_logit(errors, 5.0), torch.tensor([0.2 + 0.6 * p]), "sigmoid")
        torch.testing.assert_close(found.loss, wanted)


def test_safeguard_takes_mu_off_the_winners_error():
    # (1 - 0.25) * 0.5 / 1.5 = 0.25 of the loser's slope
    loser = torch.tensor([2.0], requires_grad=True)
    errors = as_pair_errors(torch.tensor([0.5, 2.0]), torch.zeros(2), overlap=torch.tensor([1.5]))
    held = safeguarded(replace(errors, loser=loser), mu=0.25)
    held.loser.sum().backward()
    assert loser.grad.item() == pytest.approx(0.25)
    assert held.loser.item() == 2.0


def test_the_safeguards_scale_has_no_slope_of_its_own():
    winner = torch.tensor([0.5], requires_grad=True)
    loser = torch.tensor([2.0], requires_grad=True)
    errors = as_pair_errors(torch.tensor([0.5, 2.0]), torch.zeros(2), overlap=torch.tensor([1.5]))
    held = safeguarded(replace(errors, winner=winner, loser=loser * 1.0))
    held.loser.sum().backward()
    assert winner.grad is None


def test_mapo_takes_a_winner_without_error():
    out = LOSSES["mapo"].function(
        as_pair_errors(torch.tensor([0.0, 1.0]).double(), torch.zeros(2).double()),
        LossSettings(0.1),
    )
    # phi(0) = 1, phi(0.5) = 0.5 / (e^0.5 - 1) = 0.7707: a logit of 229
    assert out.margin.item() == pytest.approx(1000 * (1 - 0.5 / math.expm1(0.5)))
    assert out.loss.item() == pytest.approx(0.0, abs=1e-12)


def test_mapo_adds_the_preference_to_the_winners_error():
    even = as_pair_errors(torch.tensor([0.5, 0.5]), torch.zeros(2))
    out = LOSSES["mapo"].function(even, LossSettings(0.1))
    assert out.loss.item() == pytest.approx(0.5 + 0.1 * math.log(2))


def test_losses_by_hand_at_a_weight_of_two():
    """Winner and loser 0.2 and 0.3, the reference 0.25 and 0.25: gains of 0.05 and -0.05."""
    errors = as_pair_errors(torch.tensor([0.2, 0.3]).double(), torch.tensor([0.25, 0.25]).double())
    errors = replace(errors, weight=torch.tensor([2.0]).double())

    def found(name):
        out = LOSSES[name].function(errors, LossSettings(3.0))
        return out.loss.item(), out.margin.item()

    assert found("sft") == (pytest.approx(0.4), 0)
    assert found("denoising") == (pytest.approx(0.5), 0)
    # beta k = 6: sigmoid(-0.3) for both images, and a margin of 6 times 0.1
    assert found("kto") == (pytest.approx(1 / (1 + math.exp(0.3))), pytest.approx(0.6))


def test_pooled_errors_are_weighted_means_over_a_pairs_states():
    """Two pairs of two states, weights 1 and 2: (1 + 2 * 2) / 2 = 2.5 and (3 + 2 * 4) / 2."""
    one = torch.tensor([1.0, 2.0, 3.0, 4.0])
    errors = as_pair_errors(
        torch.cat([one, 10 * one]), torch.cat([2 * one, 20 * one]), moved=torch.cat([-one, one])
    )
    errors = replace(errors, weight=torch.tensor([1.0, 2.0, 1.0, 2.0]))
    found, wanted = pooled(errors, 2), torch.tensor([2.5, 2.5, 5.5, 5.5])
    assert torch.equal(found.weight, torch.ones(4)) and torch.equal(found.winner, wanted)
    assert torch.equal(found.loser, 10 * wanted) and torch.equal(found.loser_ref, 20 * wanted)
    assert torch.equal(found.winner_ref, 2 * wanted)
    assert torch.equal(found.winner_moved, -wanted) and torch.equal(found.loser_moved, wanted)


def test_dmpo_by_hand():
    """Logit log 3: p = 3/4 against q = 0.99; p = 1/2 against q = 0.9 of the label 1 at 10%."""
    logit = as_pair_errors(torch.tensor([0.0, 2 * math.log(3)]).double(), torch.zeros(2).double())
    wanted = 0.75 * math.log(0.75 / 0.99) + 0.25 * math.log(0.25 / 0.01)
    assert LOSSES["dmpo"].function(logit, LossSettings(1.0)).loss.item() == pytest.approx(wanted)
    same = as_pair_errors(torch.ones(2).double(), torch.ones(2).double())
    wanted = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    smoothed = LOSSES["dmpo"].function(same, LossSettings(9.0, label_smoothing=0.1))
    assert smoothed.loss.item() == pytest.approx(wanted)
    unsure = replace(same, preference=torch.tensor([0.5]).double())
    assert LOSSES["dmpo"].function(unsure, LossSettings(9.0)).loss.item() == pytest.approx(0)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_nft_is_the_denoising_loss_of_its_two_policies(beta):
    """From vectors: v+ on the better image, v- on the worse, shared out by a soft label."""
    generator = torch.Generator().manual_seed(4)
    theta, ref, star = torch.randn(3, 2, 7, generator=generator, dtype=torch.float64)
    better = ((1 - beta) * ref + beta * theta - star).square().mean(1)
    worse = ((1 + beta) * ref - beta * theta - star).square().mean(1)
    of = [(a - b).square().mean(1) for a, b in ((theta, star), (ref, star), (theta, ref))]
    for p in (1.0, 0.7):
        label = {"preference": torch.tensor([p]).double(), "weight": torch.tensor([3.0]).double()}
        errors = as_pair_errors(of[0], of[1], moved=of[2], **label)
        r = torch.tensor([p, 1 - p]).double()
        out = LOSSES["nft"].function(errors, LossSettings(beta))
        assert out.loss.item() == pytest.approx((3 * (r * better + (1 - r) * worse)).mean().item())
        gain = (of[1] - of[0])[0] - (of[1] - of[0])[1]
        assert out.margin.item() == pytest.approx((3 * beta * gain).item())


def test_the_usual_betas_are_those_of_the_page_of_objectives():
    page = (Path(__file__).parents[3] / "docs/explanation/objectives.md").read_text()
    rows = page.partition("| loss | usual β |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[c.strip() for c in row.split("|")[1:3]] for row in rows]
    told = {
        n: float(b.partition(";")[0]) for names, b in cells for n in re.findall(r"`(\w+)`", names)
    }
    assert told == BETAS


def test_pairs_are_inverted_for_states_or_noise_of_their_inversion():
    inverted = {path for path in PATHS if Method("dpo", path).inverts}
    assert inverted == {"trajectory", "released", "line"}


def test_every_loss_with_a_beta_has_a_usual_one():
    assert set(BETAS) == {name for name, uses in USES.items() if "beta" in uses}


def test_half_precision_errors_are_taken_in_float32():
    target, prediction = torch.full((2, 4), 300.0).half(), torch.zeros(2, 4).half()
    assert squared_error(target, prediction).tolist() == [90000.0] * 2  # over half's 65504
    assert residual_overlap(target, prediction).tolist() == [90000.0]
    for a, b in ((target.double(), prediction), (target, prediction.double())):
        assert squared_error(a, b).dtype == residual_overlap(a, b).dtype == torch.float32


def test_the_overlap_is_of_residuals():
    # residuals (1, 1) and (2, 3), not sums (1, 3) and (4, 5)
    target, prediction = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[0.0, 1], [1, 1]])
    assert residual_overlap(target, prediction).tolist() == [2.5]
    assert squared_error(target, prediction).tolist() == [1.0, 6.5]
    region = torch.tensor([[0.5, 1.5]])
    assert residual_overlap(target, prediction, region).tolist() == [2.75]
    assert squared_error(target, prediction, region).tolist() == [1.0, 7.75]


def test_errors_are_split_or_refused():
    errors = as_pair_errors(torch.arange(4.0), torch.arange(4.0, 8.0))
    assert errors.winner_moved.tolist() == errors.loser_moved.tolist() == [0, 0]
    assert errors.weight.tolist() == errors.preference.tolist() == [1, 1]
    assert errors.overlap.tolist() == errors.baseline.tolist() == [0, 0]
    for shapes in ((3, 3), (4, 2), (2, 4)):
        with pytest.raises(ValueError, match="need two equal"):
            as_pair_errors(*(torch.zeros(n) for n in shapes))


@pytest.mark.parametrize(
    ("beta", "before", "loss", "expected"),
    [
        (5000.0, "dpo", "kto", 2500.0),  # usual are 2000 and 1000
        (100.0, "dpo", "kto", 50.0),
        (50.0, "kto", "dpo", 100.0),
        (5000.0, "dpo", "nft", 1.0),  # a weight, whatever the errors are
        (0.3, "nft", "dpo", 2000.0),
        (5000.0, "dpo", "sft", None),
        (7.0, "sft", "dpo", None),
    ],
)
def test_a_beta_is_carried_to_another_loss(beta, before, loss, expected):
    assert carried_beta(beta, before, loss) == expected
