"""The commands around the page: ``pairs sample``, ``web``, ``pairs export``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shlex import join, quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from inversion_dpo.cli.options import (
    DEFAULT,
    DRAWS,
    FirstSeed,
    Preset,
    resolved,
    settings_of,
    written_to,
)
from inversion_dpo.run.words import counted

if TYPE_CHECKING:
    from inversion_dpo.run.fields import Config


@dataclass(frozen=True)
class Subject:
    """What the page is about: some data, and the run that trains on it, if there is one."""

    name: str
    config: Config
    run: Path | None
    labels: Path


QUESTIONS = {
    "pairs": "Which image is better for this prompt?",
    "thumbs": "Is this a good image for this prompt?",
    "ratings": "How good is this image for this prompt, from 1 (bad) to 5 (very good)?",
}


def subject_of(
    given: str, preset: str, overrides: list[str], labels: Path | None, kind: str = "pairs"
) -> Subject:
    """Find a run by its folder, which has config.yaml, or data with the settings of a preset.

    Labels go to RUN/labels.sqlite, or to NAME.labels.sqlite in the current folder; thumbs and
    ratings to a file that is named after them.
    """
    folder, file = Path(given), "labels" if kind == "pairs" else kind
    if (folder / "config.yaml").is_file():
        config = resolved("web", str(folder / "config.yaml"), overrides)
        return Subject(folder.resolve().name, config, folder, labels or folder / f"{file}.sqlite")
    config = resolved("web", preset, [*overrides, f"data.pairs={given}"])
    stem = Path(given.replace(":", "/")).stem or "pairs"
    name = given if given.startswith(("asset:", "hf:")) else folder.resolve().name
    return Subject(name, config, None, labels or Path(f"{stem}.{file}.sqlite"))


def fill(store: Any, config: Config, limit: int) -> tuple[int, Counter[str]]:
    """Add the configured pairs to the store: how many there are, and what was left out."""
    from inversion_dpo.labels.questions import questions

    d, counts = config.data, Counter[str]()
    asked = questions(d, min(limit, d.limit or limit), counts, alone=store.kind != "pairs")
    total = store.add(asked)
    return total, counts + Counter(other=total - counts["pairs"])


def rest_text(counts: Counter[str]) -> str:
    """Say what of the data is not asked about, and what else is; nothing if neither."""
    from inversion_dpo.data.source import left_out_words

    dropped = left_out_words(counts)
    more = "; the data have more rows than --limit or data.limit takes" * counts["beyond"]
    if other := counts["other"]:
        more += f"; {counted(other, 'of them is', 'of them are')} of other data, or of an earlier "
        more += "--limit: to label this data alone give a new file as --labels"
    return f"{f'; left out: {dropped}' * bool(dropped)}{more}"


def web(
    subject: Annotated[
        str, typer.Argument(metavar="RUN_OR_DATA", help="A run's folder, or pairs to label.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="How data is read, and which model: data.*, model.*"
        ),
    ] = None,
    config: Annotated[
        str, typer.Option("--config", "-c", help="Preset or YAML file: the model, for data.")
    ] = DEFAULT,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="SQLite file of the labels; without it, RUN/labels.sqlite or one in this folder."
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Most pairs that people see; the page copies them.")
    ] = 1000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Allow a --host that others can reach.")
    ] = False,
    question: Annotated[
        str | None,
        typer.Option(help="What people are asked; without it, the question of the --kind."),
    ] = None,
    kind: Annotated[
        Literal["pairs", "thumbs", "ratings"],
        typer.Option(help="What people label: pairs, or one image by a thumb or by 1 to 5."),
    ] = "pairs",
) -> None:
    """Follow a run, compare policy and reference (also blind), label pairs: in the browser.

    Only this machine can reach the page. Labels are on the disk before the next pair is shown, and
    `inversion-dpo pairs export` makes pairs of them.

    Example: inversion-dpo web my_pairs.parquet
    """
    about = subject_of(subject, config, overrides or [], labels, kind)
    with web_extra():
        from inversion_dpo.web.guard import hosts_for
        from inversion_dpo.web.server import listen, serve

        hosts = hosts_for(host, allow_remote)
        listening = listen(host, port)
        app, closing = page_of(about, limit, (kind, question or QUESTIONS[kind]), hosts)
    serve(app, listening, typer.echo)
    typer.echo(closing())


@contextmanager
def web_extra() -> Iterator[None]:
    """Say what to install where the packages of the page are missing."""
    from inversion_dpo.labels.questions import WebError

    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "krippendorff"):
            raise
        raise WebError(
            "the page needs the packages of the extra: pip install 'inversion-dpo[web]'"
        ) from error


def pairs_export(
    labels: Annotated[Path, typer.Argument(help="The SQLite file that `web` wrote.")],
    output: Annotated[Path, written_to("Parquet file; replaced if this command wrote it.")],
    labeller: Annotated[
        str | None, typer.Option(help="Take one person's labels; without it, the majority.")
    ] = None,
) -> None:
    """Write hand-made labels as pairs that `train` reads (Pick-a-Pic's columns).

    Example: inversion-dpo pairs export pairs.labels.sqlite -o labelled.parquet
    """
    from inversion_dpo.labels.export import export, summary
    from inversion_dpo.labels.questions import WebError
    from inversion_dpo.labels.store import LabelStore
    from inversion_dpo.run.folder import sole_writer

    if not labels.is_file():
        raise WebError(f"there is no file {labels}; label pairs first: inversion-dpo web DATA")
    store = LabelStore(labels, None)
    with sole_writer(output, "pairs export"):
        counts = export(store, output, labeller)
    typer.echo(f"{output}: {summary(counts, store.kind)}")


def pairs_sample(
    output: Annotated[Path, written_to("Parquet file; resumed if begun, kept if whole.")],
    overrides: Annotated[
        list[str] | None,
        settings_of(DRAWS, "evaluation.guidance_scale=5"),
    ] = None,
    config: Preset = DEFAULT,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Text file, a prompt a line, or a prompt set; the embedded model has its own."
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, max=10**6, help="How many pairs; each prompt gives one.")
    ] = 36,
    seed: FirstSeed = 0,
) -> None:
    """Sample two images of each prompt for people to label.

    The settings evaluation.* say how: steps, guidance, batch.

    Example: inversion-dpo pairs sample -c sd15 --prompts my_prompts.txt -o pairs.parquet
    """
    from inversion_dpo.evaluation.prompt_sets import read_prompt_set
    from inversion_dpo.evaluation.readiness import check_sampling
    from inversion_dpo.labels.asking import sample_pairs, samples_beside
    from inversion_dpo.run.fields import ConfigError
    from inversion_dpo.run.folder import check_parquet, sole_writer

    check_parquet(output)
    settings = resolved("pairs sample", config, overrides)
    if prompts is None and not settings.model.path.startswith("asset:"):
        raise ConfigError(f"{settings.model.path} needs prompts: --prompts FILE, one a line")
    source = str(count) if prompts in (None, "scenes") else str(prompts)
    asked = read_prompt_set(source, count, option="--prompts")
    images, sizes = 2 * len(asked.prompts), asked.size_of.values()
    check_sampling(settings, samples_beside(output), images, "--count", asked.sources, sizes)
    with sole_writer(output):
        made = sample_pairs(output, settings, asked, seed)
    model = [o for o in overrides or () if o.startswith("model.")]
    given = [] if config == DEFAULT else ["-c", str(config)]
    words = join(["inversion-dpo", "web", str(output), *given, *model])
    typer.echo(f"{counted(made, 'pair')} in {output}\nnext: {words}")


def page_of(
    about: Subject, limit: int, asked: tuple[str, str], hosts: list[str]
) -> tuple[Any, Callable[[], str]]:
    """Build the application, and what to say once it has ended.

    ``asked`` is the kind of labels and the question. The pairs of data are read now; those of a run
    when somebody first opens the labelling page.
    """
    from inversion_dpo.labels.store import LabelStore
    from inversion_dpo.web.app import label_tab, make_app
    from inversion_dpo.web.blind import Blind
    from inversion_dpo.web.comparing import compare_tab
    from inversion_dpo.web.follow import follow_tab
    from inversion_dpo.web.labelling import Asking
    from inversion_dpo.web.studio import Studio

    (kind, question), run, new = asked, about.run, not about.labels.exists()
    store = LabelStore(about.labels, kind)
    one = "pair" if kind == "pairs" else "image"
    compared = question if kind == "pairs" else QUESTIONS["pairs"]

    @cache
    def pairs() -> int:
        total, counts = fill(store, about.config, limit)
        typer.echo(f"{counted(total, one)} in {about.labels}{rest_text(counts)}")
        return total

    then = (
        f"inversion-dpo pairs export {quote(str(about.labels))} -o labelled.parquet\n"
        "inversion-dpo train -o runs/mine data.pairs=labelled.parquet"
        + " objective.name=kto"
        * (kind == "thumbs")
    )
    studio = Studio(about.config, run)
    asking = Asking("label", question, then, lambda who: (store, pairs()), kind=kind)
    tabs = [label_tab(asking, "Label", store.image), compare_tab(studio)]
    if run:
        blind = Blind(studio, run)
        report = f"inversion-dpo report {quote(str(run))}"
        asking = Asking("blind", compared, report, blind.ready, blind.verdict)
        tabs += [label_tab(asking, "Blind", blind.image), follow_tab(run, studio)]
        tabs.reverse()
    else:
        try:
            pairs()
        except Exception:
            store.close()
            if new:
                about.labels.unlink()
            raise

    def closing() -> str:
        done = store.covered()
        store.close()
        what = counted(done, f"{one} is", f"{one}s are")
        return f"{what} labelled; next:\n{then}" if done else "closed"

    return make_app(tabs, about.name, hosts), closing
