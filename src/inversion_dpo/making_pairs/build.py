"""``pairs build``: from the configuration's prompts, models and scorers to files of pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from inversion_dpo.data.annotations import is_annotated, read_annotations
from inversion_dpo.data.images import DataError
from inversion_dpo.evaluation.prompt_sets import PromptSet, intended_graphs, read_prompt_set, scenes
from inversion_dpo.evaluation.readiness import check_sampling
from inversion_dpo.evaluation.samples import model_digest
from inversion_dpo.evaluation.scorers.registry import SCENES, ScorerGroup, load_scorers
from inversion_dpo.evaluation.scorers.scene_graph import SCENE_GRAPH
from inversion_dpo.evaluation.sides import Side, details_of, opened, sampler_of, side, sizes_in
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.graphs.scene_key import SceneKey
from inversion_dpo.making_pairs.candidates import Labelled, pair_rows, schema_of, write_rows
from inversion_dpo.making_pairs.duplicates import Duplicates
from inversion_dpo.making_pairs.labelling import (
    WEIGHTS,
    Cell,
    Draw,
    Judge,
    Labelling,
    Pixels,
    Sampling,
    Verdict,
    claim,
    fill,
)
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import Config, ConfigError
from inversion_dpo.run.disk import check_writable, sha256_of
from inversion_dpo.run.fields import BuildConfig
from inversion_dpo.run.folder import flat, occupied
from inversion_dpo.run.processes import current_team
from inversion_dpo.run.together import check_together
from inversion_dpo.run.words import counted, typed

SEEDS = 1_000_000  # room for the samples of one cell
LABELLINGS = {  # of the shipped pairs: least differences of winner and loser
    "taste": Labelling(("warmth",), "best_worst", 0.25),  # a warm ground, never asked for
    "composition": Labelling(("composition",), "best_worst", 0.2),  # what the caption asks for
}
MOST_DRAWS = 20  # of the scenes: prompts tried for each pair that is wanted


def build(config: Config, output: Path) -> dict[str, int]:
    """Sample, score, mine and write; the number of pairs by file.

    Without ``build.splits`` OUTPUT/NAME.parquet for each labelling, with them the folder
    OUTPUT/dataset. Of several processes all must call it; the first one writes and has the numbers.
    """
    check_build(config, output)
    with occupied(output, run=False):
        return _built(config, output)


def _built(config: Config, output: Path) -> dict[str, int]:
    from inversion_dpo.making_pairs.dataset import write_dataset

    b = config.build
    if current_team().main:
        claim(output, _sampled_by(config))
    check_together(output, flat(config))
    scorers, folder = scorers_of(config, output / "scores.sqlite"), output / "candidates"

    def judge(images: Sequence[Pixels], graphs: Sequence[SceneGraph]) -> Verdict:
        return scorers.judge(images, [graph.caption for graph in graphs], graphs)

    sampling = sampling_of(config, judge)
    if b.splits:
        found = fill_splits(config, folder, sampling)
    else:
        cell = Cell("candidates", single_graphs(config), b.limit, b.seed * 10 * SEEDS)
        found = fill(cell, folder, sampling, labellings(config), Duplicates(b.near))
    scorers.conclude()
    write = write_dataset if b.splits else write_labelled
    return write(config, output, found) if current_team().main else {}


def check_build(config: Config, output: Path) -> None:
    """Refuse, before anything is sampled or written, what cannot be used.

    That is prompts, kinds of scenes, scorers and their scores, models, the folder and the disk.
    """
    b = config.build
    check_writable(output)
    if b.prompts == BuildConfig.prompts and not config.model.path.startswith("asset:"):
        raise ConfigError(
            f"{config.model.path} needs prompts, since {b.prompts} captions of the embedded world "
            "fit its own model alone: --prompts FILE, one a line"
        )
    for kind in b.mix:
        scenes("train", kind, b.seed)  # a kind that is none is refused before anything is sampled
    if not config.evaluation.scorer:
        raise ConfigError("pairs build needs --scorer or evaluation.scorer, which says who labels")
    graphs = [] if b.prompts == SCENES else single_graphs(config)
    known = scorers_of(config).names([g.caption for g in graphs if not g.items])
    if odd := [name for name in b.by if name not in known]:
        raise ConfigError(f"build.by: {odd[0]!r} is no score; choose from {', '.join(known)}")
    if repeated := [name for name in b.by if b.by.count(name) > 1]:
        raise ConfigError(f"build.by names {repeated[0]} twice: give each score once")
    images = b.samples * (sum(b.splits.values()) or min(len(graphs), b.limit or len(graphs)))
    asked, captions = details_of(b.prompts), [graph.caption for graph in graphs]
    sources, sizes = [asked.source_of.get(c) for c in captions], asked.size_of.values()
    for model in (None, *b.models):
        settings = side(config, model).config
        check_sampling(settings, output, images, "build.samples", sources, sizes)


def labellings(config: Config) -> dict[str, Labelling]:
    """By name of the file: of numbered scenes the shipped pairs' two, otherwise the build's one."""
    b = config.build
    if b.prompts.isdecimal():
        return dict(LABELLINGS)
    return {"pairs": Labelling(tuple(b.by), b.mining, b.least, b.once)}


def write_labelled(
    config: Config, output: Path, labelled: Mapping[str, Sequence[Labelled]]
) -> dict[str, int]:
    """One Parquet file for each labelling; DataError if one has no pairs."""
    for name, pairs in labelled.items():
        if not pairs:
            raise DataError(
                f"{output}: no prompt gave a pair of {name}; take more samples, or lower --least"
            )
        rows = pair_rows(pairs, config.build.seed, details_of(config.build.prompts).source_of)
        write_rows(output / f"{name}.parquet", rows, schema_of(rows))
    return {name: len(pairs) for name, pairs in labelled.items()}


def single_graphs(config: Config) -> list[SceneGraph]:
    """Give the prompts in one piece; those without a scene graph are a caption alone."""
    b = config.build
    if is_annotated(b.prompts):
        graphs, problems = read_annotations(b.prompts)
        if problems:
            raise DataError(
                f"{problems[0]} (and {counted(len(problems) - 1, 'more row')}); see "
                f"`inversion-dpo pairs check {typed(b.prompts)}`"
            )
        if silent := [g for g in graphs if not g.caption.strip()]:
            raise DataError(
                f"{b.prompts}: {counted(len(silent), 'graph has', 'graphs have')} no "
                "caption_ori to sample by: write one"
            )
        return graphs
    asked = read_prompt_set(b.prompts, None, b.seed + 1, "--prompts (build.prompts)")
    known = intended_graphs(asked)
    captions = dict.fromkeys(asked.prompts)
    return [replace(known.get(c, SceneGraph((), (), c)), caption=c) for c in captions]


def fill_splits(config: Config, folder: Path, sampling: Sampling) -> dict[str, list[Labelled]]:
    """Give the pairs of each split, in an order of chance; DataError if there are fewer than asked.

    Later splits of the configuration come first, so that what is held out is drawn freely and what
    is trained on avoids it: a scene of another split, in whatever words, is not sampled.
    """
    b, taken = config.build, dict[SceneKey, str]()
    duplicates, how = Duplicates(b.near), labellings(config)
    found: dict[str, list[Labelled]] = {}
    for number, split in enumerate(reversed(b.splits)):
        pairs: list[Labelled] = []
        for k, (name, graphs, quota) in enumerate(split_cells(config, split)):
            seed = (b.seed * 10 + number) * 10 * SEEDS + k * SEEDS
            cell = Cell(name, _not_elsewhere(graphs, split, taken), quota, seed)
            (made,) = fill(cell, folder, sampling, how, duplicates).values()
            if len(made) < quota:
                raise DataError(
                    f"{name}: only {len(made)} of {quota} pairs came out; take more "
                    "samples, lower build.least or ask for fewer"
                )
            pairs += made
        order = np.random.default_rng([b.seed, number]).permutation(len(pairs))
        found[split] = [pairs[k] for k in order]
    return {split: found[split] for split in b.splits}


def split_cells(config: Config, split: str) -> list[tuple[str, Iterable[SceneGraph], int]]:
    """Name, graphs and wanted pairs of each cell of a split: of scenes one for each kind."""
    b, wanted = config.build, config.build.splits[split]
    if b.prompts != SCENES:
        graphs = [g for g in single_graphs(config) if split_by_hash(g, b.splits) == split]
        return [(split, graphs, wanted)]
    quotas = apportion(wanted, list(b.mix.values()))
    return [
        (
            f"{split}-{kind.replace('/', '-')}",
            islice(scenes(split, kind, b.seed), MOST_DRAWS * quota),
            quota,
        )
        for kind, quota in zip(b.mix, quotas, strict=True)
    ]


def split_by_hash(graph: SceneGraph, shares: Mapping[str, float]) -> str:
    """One of the splits, in proportion to their shares, from the SHA-256 of the scene's text."""
    digest = hashlib.sha256(SceneKey(graph).text.encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares.values())
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return list(shares)[-1]


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the shares that add up to the total (largest remainders)."""
    exact = [total * share / sum(shares) for share in shares]
    whole = [int(x) for x in exact]
    rest = sorted(range(len(exact)), key=lambda k: whole[k] - exact[k])
    for k in rest[: total - sum(whole)]:
        whole[k] += 1
    return whole


def _not_elsewhere(
    graphs: Iterable[SceneGraph], split: str, taken: dict[SceneKey, str]
) -> Iterable[SceneGraph]:
    for graph in graphs:
        if taken.setdefault(SceneKey(graph), split) == split:
            yield graph


def sampling_of(config: Config, judge: Judge) -> Sampling:
    """Models and guidances of the configuration; a model is loaded when it is needed."""
    b = config.build
    scales = b.guidance_scales or [config.evaluation.guidance_scale]
    models = {"reference": side(config, None)}
    for model in b.models:
        name = model.rstrip("/").rpartition("/")[2]
        if name in models:
            raise ConfigError(f"build.models: {model}: another one is called {name}; rename it")
        models[name] = side(config, model)
    sources = {f"{name}, guidance {s:g}": (m, s) for name, m in models.items() for s in scales}
    own = [] if b.prompts == SCENES else [graph.caption for graph in single_graphs(config)]
    draw = drawing(sources, details_of(b.prompts), own)
    return Sampling(draw, judge, b.samples, tuple(sources), b.quality)


def drawing(
    sources: Mapping[str, tuple[Side, float]], details: PromptSet, captions: Sequence[str] = ()
) -> Draw:
    """Make a sampler of (graphs with captions, seeds, source); models are loaded when needed.

    Args:
        sources: name -> model and guidance.
        details: the sizes of captions' images, and what they edit.
        captions: all that will be asked for; those whose end a model does not read are counted.
    """
    loaded, edited = dict[str, Sampler](), details.source_of

    def draw(asked: Sequence[SceneGraph], seeds: Sequence[int], source: str) -> list[Pixels]:
        model, scale = sources[source]
        name = f"{model.config.model} {model.adapter}"
        if name not in loaded:
            loaded[name] = sampler_of(model.config, model.adapter)
            loaded[name].warn_of_cut(captions)
        texts = [graph.caption for graph in asked]
        sizes = sizes_in(details, texts, model.config.model.resolution)
        images = [opened(edited.get(text)) for text in texts]
        sampler = loaded[name].under(guidance_scale=scale)
        return sampler.draw(asked, seeds, sizes=sizes, sources=images, desc="samples")

    return draw


def scorers_of(config: Config, store: Path | None = None) -> ScorerGroup:
    """Return the scorers that label, whose scores ``store`` keeps.

    ConfigError if there are none, or they cannot know graphs.
    """
    e = config.evaluation
    if config.build.prompts == SCENES and SCENE_GRAPH in str(e.scorer):
        raise ConfigError(f"build.prompts={SCENES} needs evaluation.scorer={SCENES}")
    whole = partial(prompt_set_of, config)
    return load_scorers(e.scorer or [], e.checkpoints, e.batch_size, store, e.parser, whole)


def prompt_set_of(config: Config) -> PromptSet:
    """All prompts of the build with their graphs."""
    graphs = single_graphs(config)
    said = [g if g.items else None for g in graphs]
    return PromptSet([g.caption for g in graphs], [""] * len(graphs), said)


def _own_details(prompts: str) -> list[str]:
    """Say the sizes of images and the digests of what they edit, where a prompt set has them."""
    asked = details_of(prompts)
    sizes = [f"{prompt} {size}" for prompt, size in asked.size_of.items()]
    return sizes + [f"{prompt} {sha256_of(file)}" for prompt, file in asked.source_of.items()]


def _sampled_by(config: Config) -> dict[str, object]:
    """Say what samples depend on: with splits all settings, since what is held out is avoided."""
    b, e = asdict(config.build), config.evaluation
    how = ("prompts", "samples", "guidance_scales", "models", "quality", "seed")
    asked = [] if b["prompts"] == SCENES else single_graphs(config)
    said = "\n".join([SceneKey(graph).text for graph in asked] + _own_details(b["prompts"]))
    sides = [side(config, model) for model in (None, *b["models"])]
    weights = "\n".join(model_digest(one.config, one.adapter) for one in sides)
    return {
        **(b if b["splits"] else {name: b[name] for name in how}),
        "model": asdict(config.model),
        "scorer": e.scorer,
        "checkpoints": e.checkpoints,
        "steps": e.sample_steps,
        "guidance": e.guidance_scale,
        WEIGHTS: hashlib.sha256(weights.encode()).hexdigest(),
        "asked": hashlib.sha256(said.encode()).hexdigest(),
    }
