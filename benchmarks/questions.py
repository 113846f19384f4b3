"""The open questions of the method, one command each: ``python benchmarks/questions.py a``.

a  Is it the loss? Losses that saturate per image and DPO, on fresh noise and on inverted paths.
b  What does the path give that fresh noise does not? DPO and KTO on paths, lines and parts of them.
c  A quarter: Diffusion-DPO's full budget against others with a quarter of its evaluations.
d  Under guidance: prompt dropout and guided predictions, on the shipped pairs and on pairs of the
   model's own samples under ``--guidance``; all are judged under it.
e  Rounds with KTO: ``benchmarks/scale.py`` with the settings of docs/results/kto-rounds.md.

An arm is a loss on a path, and trains on the shipped ``composition`` pairs but for d's own. Every
arm gets as many trials (rate x beta x batch and steps, seed 100, validation prompts). Its best
trial is trained again with each seed and judged on the test prompts, once. a to d share OUTPUT: a
run that several of them need, as fresh noise in a and b, is trained once. Prints gains over the
reference with 95% t intervals over seeds, evaluations with the inversion, and seconds. A forward
pass of one image is one evaluation, its backward pass two. A finished run is not repeated, so a
stopped command goes on. A second table has each arm's gains less the first arm's, seed by seed.
``--dry-run`` says what all that costs; ``--only`` takes some arms; ``--untuned`` spares the trials:
every arm has rate 3e-4, 16 pairs a step and its middle beta.
Settings at the end go to every run: ``questions.py a --seeds 0 training.mixed_precision=bf16``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scale

from inversion_dpo.compare.experiment import inversion_cost
from inversion_dpo.compare.page import cell
from inversion_dpo.compare.runs import run
from inversion_dpo.compare.summary import over_seeds, step_evaluations
from inversion_dpo.making_pairs.build import build
from inversion_dpo.maths.inversion import evaluations_per_image, passes
from inversion_dpo.maths.methods import STORED
from inversion_dpo.maths.records import Extent
from inversion_dpo.run.config import Config, load_config
from inversion_dpo.trajectories.key import window
from inversion_dpo.trajectories.method import chosen_method

ROOT = Path("runs/questions")
GAINS = ("composition", "exact", "warmth")
PAIRS = 2000  # of the shipped file at most
TUNING = ("training.seed=100", f"evaluation.prompts={scale.VALIDATION}", "evaluation.limit=200")
COMMON = ("objective.name=diffusion_dpo", "training.lr_scheduler=linear")
RATES = (1e-4, 3e-4)
BETAS = {
    "dpo": (300, 1000, 3000),
    "dpo_bounded": (30, 100, 300),
    "kto": (30, 100, 300),
    "nft": (0.1, 0.3, 1),
}
NOISE, ITERATED = "objective.path=noise", "inversion.fixed_point_iterations=1"
INVERTED, LINE = "objective.path=trajectory", "objective.path=line"
STEPPED = "objective.path=stepped"
PATHS: dict[str, tuple[str, ...]] = {
    "fresh noise": (NOISE,),
    "noise, then one step": (STEPPED, ITERATED),
    "noise, then one naive step": (STEPPED,),
    "inverted, one iteration": (INVERTED, ITERATED),
    "inverted, naive": (INVERTED,),
    "inverted in 5 steps": (INVERTED, ITERATED, "inversion.steps=5", "inversion.t_start=0.2"),
    "inverted above half": (INVERTED, ITERATED, "inversion.t_start=0.5"),
    "line": (LINE,),
    "line, rho .7": (LINE, "objective.coupling=0.7"),
    "line, rho .5": (LINE, "objective.coupling=0.5"),
    "known noise": ("objective.path=known",),
}
LONG = ((16, 360), (32, 180))  # batch and steps of a trial
FULL, QUARTER = ((16, 720), (32, 360)), ((16, 180), (32, 90))


@dataclass(frozen=True)
class Arm:
    """A loss on a path: its own settings, and the betas, batches and steps that it may choose."""

    settings: tuple[str, ...]
    betas: tuple[float, ...]
    lengths: tuple[tuple[int, int], ...] = LONG

    def trials(self) -> Iterator[tuple[str, ...]]:
        """List what tuning tries."""
        for rate, beta, (batch, steps) in itertools.product(RATES, self.betas, self.lengths):
            given = f"training.learning_rate={rate}", f"objective.beta={beta}"
            yield (*given, f"training.batch_size={batch}", f"training.steps={steps}")

    def chosen(self, *, untuned: bool, more: Sequence[str] = ()) -> list[tuple[str, ...]]:
        """List the trials; untuned only one: the highest rate, middle beta, smallest batch.

        Where ``more`` sets one of their settings too, it stands in its place.
        """
        trials = list(self.trials())
        if untuned:
            trials = list(Arm((), self.betas[1:2], self.lengths[:1]).trials())[-1:]
        given = {setting.partition("=")[0]: setting for setting in more}
        return list(
            dict.fromkeys(tuple(given.get(s.partition("=")[0], s) for s in t) for t in trials)
        )


def arm(loss: str, path: str, *more: str, lengths: tuple[tuple[int, int], ...] = LONG) -> Arm:
    """Make an arm of a loss and a path, by their names."""
    return Arm((f"objective.loss={loss}", *PATHS[path], *more), BETAS[loss], lengths)


OWN = ("build.prompts=1500", "build.samples=4", "build.seed=7", "evaluation.scorer=scenes")


def own_config(guidance: float) -> Config:
    """Say how the model samples pairs of its own."""
    return load_config("composition", [*OWN, f"evaluation.guidance_scale={guidance:g}"])


def own_pairs(root: Path, guidance: float, *, make: bool) -> Path:
    """Find the pairs of the model's own samples under a guidance; make them if they are not there.

    Args:
        root: folder of the questions.
        guidance: of the samples.
        make: or only say where they will be.
    """
    file = root / f"own-pairs-{guidance:g}" / "composition.parquet"
    if make and not file.exists():
        build(own_config(guidance), file.parent)
    return file


def own_cost(guidance: float) -> float:
    """Count the evaluations that sampling them takes."""
    b, e = own_config(guidance).build, own_config(guidance).evaluation
    return int(b.prompts) * b.samples * e.sample_steps * passes(e.guidance_scale)


def arms(question: str, guidance: float = 2.0, root: Path = ROOT) -> dict[str, Arm]:
    """Name the arms of a question; those of d are sampled under a guidance."""
    if question == "a":
        both = itertools.product(BETAS, ("fresh noise", "inverted, one iteration"))
        return {f"{loss}, {path}": arm(loss, path) for loss, path in both}
    if question == "b":
        both = itertools.product(("dpo", "kto"), PATHS)
        return {f"{loss}, {path}": arm(loss, path) for loss, path in both}
    if question == "c":  # what inverts has fewer pairs and steps, see the test
        inverted, line = "inverted, one iteration", "line, rho .5"
        few = {"data.limit=340": ((16, 120), (32, 60)), "data.limit=260": ((16, 136), (32, 68))}
        (own, short), (lines, shorter) = few.items()
        return {
            "dpo, fresh noise, full budget": arm("dpo", "fresh noise", lengths=FULL),
            "dpo, fresh noise": arm("dpo", "fresh noise", lengths=QUARTER),
            "kto, fresh noise": arm("kto", "fresh noise", lengths=QUARTER),
            "dpo_bounded, fresh noise": arm("dpo_bounded", "fresh noise", lengths=QUARTER),
            "dpo, known noise": arm("dpo", "known noise", lengths=QUARTER),
            "dpo, inverted": arm("dpo", inverted, own, lengths=short),
            "kto, inverted": arm("kto", inverted, own, lengths=short),
            "dpo, line, rho .5": arm("dpo", line, lines, lengths=shorter),
        }
    sampled = f"evaluation.guidance_scale={guidance:g}"
    own = f"data.pairs={own_pairs(root, guidance, make=False)}"
    found = {}
    for loss, trained, dropout in itertools.product(("dpo", "kto"), (1, 2), (0, 0.1)):
        more = f"objective.guidance_scale={trained}", f"data.prompt_dropout={dropout}", sampled
        name = f"{loss}, trained under {trained}, dropout {dropout}, sampled under {guidance:g}"
        found[name] = arm(loss, "fresh noise", *more)
        if dropout:
            found[f"{name}, own pairs"] = arm(loss, "fresh noise", *more, own)
    return found


def config_of(arm: Arm, trial: Sequence[str], more: Sequence[str]) -> Config:
    """Put together the settings of a run; later ones win."""
    return load_config("composition", [*COMMON, *arm.settings, *trial, *more])


# ---------------------------------------------------------------- what it costs


def evaluations(config: Config) -> dict[str, float]:
    """Count network evaluations of a run: inversion, training, and sampling for its score."""
    i, o, t, e = config.inversion, config.objective, config.training, config.evaluation
    method, steps = chosen_method(config), t.steps * t.batch_size * o.states
    low, high = window(config)
    inversion = 0.0
    if method.inverts:
        pairs = min(config.data.limit or PAIRS, PAIRS)
        visited = min(pairs - max(1, round(pairs * config.data.holdout)), steps)
        extent = Extent(i.start, low, high, i.fixed_point_iterations)
        scales = i.guidance_scale, o.guidance_scale if method.path in STORED else i.guidance_scale
        inversion = 2.0 * visited * evaluations_per_image(extent, *scales)
    anew = method.path not in STORED or config.data.prompt_dropout > 0  # the reference
    step = 3 + anew + (1 + i.fixed_point_iterations) * (method.path == "stepped")
    training = 2.0 * steps * passes(o.guidance_scale) * step
    sampling = (e.limit or 500) * e.sample_steps * passes(e.guidance_scale)
    return {"inversion": inversion, "training": training, "sampling": float(sampling)}


def total(config: Config) -> float:
    """Add up the evaluations of a run."""
    return sum(evaluations(config).values())


def plan(question: str, found: dict[str, Arm], given: argparse.Namespace) -> str:
    """Write what a question costs, arm by arm; a forward pass takes 1 / rate seconds."""
    rows = ["| arm | trials | evaluations of tuning | of all seeds | hours |", "|---" * 5 + "|"]
    hours = 0.0
    for name, one in found.items():
        sized = one.lengths  # rate and beta cost nothing
        tries = 0 if given.untuned else len(RATES) * len(one.betas)
        first = one.chosen(untuned=given.untuned)[: len(sized)]
        tuned = tries * sum(total(config_of(one, t, [*TUNING, *given.more])) for t in first)
        seeds = len(given.seeds) * max(total(config_of(one, t, given.more)) for t in first)
        taken = (tuned + seeds) / given.rate / 3600
        hours += taken
        rows.append(
            f"| {name} | {tries * len(sized)} | {tuned:,.0f} | {seeds:,.0f} | {taken:.1f} |"
        )
    if question == "d":
        spent = own_cost(given.guidance)
        hours += spent / given.rate / 3600
        rows += ["", f"sampling own pairs: {spent:,.0f} evaluations"]
    return "\n".join([*rows, "", f"question {question}: about {hours:.1f} hours in all"])


# ---------------------------------------------------------------- what it finds


def answer(root: Path, found: dict[str, Arm], given: argparse.Namespace) -> str:
    """Tune and train what is not yet done; Markdown, a row for each arm."""
    head = ["arm", "composition gain", "exact gain", "warmth gain", "drift", "evaluations"]
    rows = [f"| {' | '.join([*head, 'seconds', 'chosen'])} |", "|---" * 8 + "|"]
    each = dict[str, list[Any]]()
    for name, one in found.items():
        scores, trials = {}, one.chosen(untuned=given.untuned, more=given.more)
        for trial in trials[: 0 if given.untuned else None]:
            tuning = config_of(one, trial, [*TUNING, *given.more])
            label = f"{name}, tuning, {', '.join(t.partition('=')[2] for t in trial)}"
            scores[trial] = run(root, label, tuning, 0)["metrics"]["composition"]["gain"]
        best = max(trials, key=lambda trial: scores.get(trial, 0))
        configs = [config_of(one, best, [*given.more, f"training.seed={s}"]) for s in given.seeds]
        chosen = ", ".join(t.partition("=")[2] for t in best)
        labels = [f"{name}, {chosen}, seed {seed}" for seed in given.seeds]
        results = [run(root, *pair, 0) for pair in zip(labels, configs, strict=True)]
        each[name] = results
        rows.append(row(name, best, results, inversion_cost(root, configs[0]), configs[0]))
        print(rows[-1], flush=True)
    return "\n".join([*rows, *differences(each)])


def differences(each: dict[str, list[Any]]) -> list[str]:
    """Write what each arm gains beside the first, seed by seed."""
    (first, base), *others = each.items()
    rows = ["", f"| beside {first} | {' | '.join(GAINS)} |", "|---" * (1 + len(GAINS)) + "|"]
    for name, results in others:
        cells = []
        for metric in GAINS:
            both = zip(results, base, strict=True)
            of_seeds = [[r["metrics"][metric]["gain"] for r in pair] for pair in both]
            cells.append(cell(over_seeds([here - there for here, there in of_seeds])))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows if others else []


def row(
    name: str, best: Sequence[str], results: list[Any], inversion: dict[str, float], config: Config
) -> str:
    """Write a line of the table."""
    gains = [cell(over_seeds([r["metrics"][n]["gain"] for r in results])) for n in GAINS]
    drift = np.mean([r["history"][-1]["heldout_drift"] for r in results])
    steps = config.training.steps
    spent = inversion["evaluations"] + steps * step_evaluations(results[0]["history"])
    seconds = inversion["seconds"] + steps * np.median([r["step_seconds"] for r in results])
    chosen = ", ".join(setting.partition(".")[2] for setting in best)
    return (
        f"| {name} | {' | '.join(gains)} | {drift:.4f} | {spent:,.0f} | {seconds:.0f} | {chosen} |"
    )


ROUNDS = scale.Settings(
    method="kto", beta=100.0, prompts=3000, steps=1200, batch=64, rank=64, hard=0.8
)


def rounds(given: argparse.Namespace) -> str | None:
    """Run ``benchmarks/scale.py`` with the settings of question e, or say what it costs."""
    s = ROUNDS
    sampling = s.prompts * s.samples * scale.CONFIG.evaluation.sample_steps
    judging = 1000 * scale.NOISES * scale.CONFIG.evaluation.sample_steps  # both sets of prompts
    each = {"sampling": 1.5 * sampling, "training": 8.0 * s.steps * s.batch, "judging": judging}
    spent = s.rounds * len(given.seeds) * sum(each.values())
    if given.dry_run:
        parts = ", ".join(f"{n} {v:,.0f}" for n, v in each.items())
        hours = spent / given.rate / 3600
        return f"a round: {parts}\nquestion e: {spent:,.0f} evaluations, about {hours:.1f} hours"
    same = {k: v for k, v in vars(s).items() if v != getattr(scale.Settings(), k)}
    options = [w for k, v in same.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    sys.argv = [scale.__file__, str(given.output), "--seeds", *map(str, given.seeds), *options]
    scale.main()
    return None


def main() -> None:
    """Answer a question, or say what that costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices="abcde", help="see above")
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="settings of every run")
    parser.add_argument("--output", type=Path, help=f"{ROOT}, or for e {ROOT}-e")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="of those that --dry-run lists")
    parser.add_argument("--guidance", type=float, default=2.0, help="of the samples in d")
    parser.add_argument("--untuned", action="store_true", help="one set of settings, no trials")
    parser.add_argument("--dry-run", action="store_true", help="say what it costs, and stop")
    parser.add_argument(
        "--rate", type=float, default=300.0, help="images a second in a forward pass; one core: 300"
    )
    given = parser.parse_intermixed_args()
    given.output = given.output or (Path(f"{ROOT}-e") if given.question == "e" else ROOT)
    if given.question == "e":
        if given.more or given.only:
            parser.error("question e takes no settings and no --only: see benchmarks/scale.py")
        text = rounds(given)
        return print(text) if text else None
    found = arms(given.question, given.guidance, given.output)
    if unknown := set(given.only or ()) - set(found):
        parser.error(f"no arm {sorted(unknown)[0]!r}; one of {'; '.join(found)}")
    found = {name: one for name, one in found.items() if name in (given.only or found)}
    if given.dry_run:
        return print(plan(given.question, found, given))
    given.output.mkdir(parents=True, exist_ok=True)
    if any(name.endswith("own pairs") for name in found):
        own_pairs(given.output, given.guidance, make=True)
    print(answer(given.output, found, given))


if __name__ == "__main__":
    main()
