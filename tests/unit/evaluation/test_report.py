"""The report page and its figures: whole, escaped, self-contained and honest in its words."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inversion_dpo.evaluation import figures, report_tables
from inversion_dpo.evaluation.metrics import compare
from inversion_dpo.evaluation.page import inline_text
from inversion_dpo.evaluation.report import most_changed
from inversion_dpo.evaluation.report_page import ReportData, write_report
from inversion_dpo.evaluation.samples import write_samples
from inversion_dpo.evaluation.wording import duration, headline, lines, statements

CAPTIONS = ["<script>alert('x')</script> & \"cross\"", "costs $5 or $6", "a star " * 60, "ö 猫"]


def picture(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scores(shift: float, n: int = 100) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    base, noise = rng.normal(0.5, 0.2, n), rng.normal(0, 0.05, (2, n))
    same = rng.normal(0.5, 0.2, n)
    return compare(
        {"warmth": base, "sg_iou": same},
        {"warmth": base + shift + noise[0], "sg_iou": same + noise[1] - noise[1].mean()},
        "warmth",
    )


def history(steps: int = 60) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(steps):
        row = {"step": step, "loss": 0.7 - step / 200, "accuracy": 0.5, "margin": step / 60}
        row |= {"winner_error": 0.30, "winner_error_ref": 0.31, "drift": 0.0, "grad_norm": 1.0}
        row |= {"loser_error": 0.33, "loser_error_ref": 0.31}
        if step % 20 == 0:
            row |= {"heldout_accuracy": 0.6, "heldout_winner_error": 0.3 - step / 1e3}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def data() -> ReportData:
    return ReportData(
        title="A run & its result",
        metrics=scores(0.3)
        | {"seconds": {"training": 83.0}, "steps": 60}
        | {
            "traits": {
                "warmer": {"share": 0.9, "low": 0.86, "high": 0.94},
                "sharper": {"share": 0.49, "low": 0.42, "high": 0.56},
            }
        },
        preference="warmth",
        samples=[(caption, picture(k), picture(9 + k)) for k, caption in enumerate(CAPTIONS)],
        scores=[{"reference": 0.25, "policy": -0.5 + 0.5 * k} for k in range(4)],
        pairs=[("a <b>bold</b> star", picture(20), picture(21))],
        history=history(),
        config="training:\n  steps: 60  # <i>\n",
        versions={"torch": "2.9.1"},
        seconds={"pairs": 12.0, "training": 83.0},
        seeds={"training": 7},
        preference_note="The image on the warmer ground wins.",
    )


@pytest.fixture(scope="module")
def folder(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("run") / "new", data).parent


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects tags and their attributes, and that every tag that opens also closes."""

    void = frozenset({"meta", "img", "br", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open += [] if tag in self.void else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_data_text_is_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;cross&#34;" in page
    assert "<script" not in page and "<b>bold" not in page and "<i>" not in page
    assert "A run &amp; its result" in page


def test_page_is_well_formed_and_needs_no_other_file(page: str) -> None:
    tags = Tags(page)
    assert not tags.open
    addresses = [a[k] or "" for _, a in tags.found for k in ("src", "href", "srcset") if k in a]
    assert len(addresses) >= 8 + 2 + 1 + 6
    assert all(a.startswith("data:image/png;base64,") for a in addresses)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags.found}
    assert "url(" not in page and "@import" not in page
    assert all(a["alt"] for tag, a in tags.found if tag == "img")


def test_page_holds_every_section(page: str) -> None:
    words = re.sub(r"<[^>]+>", " ", page)
    for part in ("Samples", "Metrics", "Training", "What the pairs prefer", "How to repeat"):
        assert part in words
    for part in ("steps: 60", "2.9.1", "1 min 23 s", "1 min 35 s", "warmer ground wins"):
        assert part in words
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


@pytest.mark.parametrize("name", ["grid", "curves", "gains"])
def test_figures_lie_beside_the_page(folder: Path, name: str) -> None:
    with Image.open(folder / f"{name}.png") as image:
        assert min(image.size) > 150
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert not list(folder.glob("*.partial"))


def test_a_win_is_called_one() -> None:
    text = headline(scores(0.3), "warmth", "held-out prompts, with the same noise")
    assert text.startswith("On 100 held-out prompts, with the same noise, the policy wins 100.0% [")
    assert "against the reference by `warmth`" in text and text.endswith("a gain.")


def test_a_loss_is_called_one() -> None:
    text = headline(scores(-0.3), "warmth", "prompts")
    assert "loses to the reference by `warmth`: it wins only 0.0% [" in text
    assert text.endswith(": a loss.") and "gain" not in text


def test_no_change_is_called_so() -> None:
    same = {"warmth": np.arange(100.0)}
    text = headline(compare(same, same, "warmth"), "warmth", "prompts")
    assert "cannot be distinguished from the reference by `warmth`: it wins 50.0% [" in text
    assert text.endswith("+0.000 [+0.000, +0.000]: no measurable change.")


def test_other_metrics_are_stated_with_their_verdict() -> None:
    [(kind, text)] = statements(scores(0.3), "warmth")
    assert kind == "none" and text.startswith("Mean `sg_iou` changes by ")
    assert text.endswith("no measurable change.")


def test_few_prompts_carry_a_warning() -> None:
    assert "read this as a trial" in headline(scores(0.3, n=5), "warmth", "prompts")
    assert "read this as a trial" not in headline(scores(0.3), "warmth", "prompts")


@pytest.mark.parametrize(
    ("n", "told"), [(1, "too few prompts to tell"), (5, "too few"), (6, "a gain")]
)
def test_what_chance_alone_may_do_is_no_gain(n: int, told: str) -> None:
    found = scores(0.3, n=n)
    assert headline(found, "warmth", "prompts").count(f"{told}") == 1
    assert ("cannot be distinguished" in headline(found, "warmth", "prompts")) == (n < 6)
    assert statements(found, "sg_iou")[0][0] == ("gain" if n == 6 else "none")
    assert told.removeprefix("a ") in report_tables.read(found["warmth"], n)
    assert any("warning: So few prompts" in line for line in lines(found))


def test_answers_that_could_not_be_read_are_told_beside_the_gain() -> None:
    read, half = np.ones(100), np.arange(100) % 2.0
    found = compare({"vqa": half, "vqa_read": half}, {"vqa": read, "vqa_read": read}, "vqa")
    text = (
        "`vqa_read`: 50% of the answers for the reference and 0% for the policy could not be read"
    )
    assert text in "\n".join(lines(found)) and text in statements(found, "vqa")[0][1]
    whole = compare({"vqa": half, "vqa_read": read}, {"vqa": read, "vqa_read": read}, "vqa")
    assert "could not be read" not in "\n".join(lines(whole))


def test_report_without_scores_claims_nothing(data: ReportData, tmp_path: Path) -> None:
    training = {"heldout_accuracy": 0.75, "heldout_pairs": 100.0}
    metrics = {"n_prompts": 4, "training": training, "traits": data.metrics["traits"]}
    largest = [("a moved star", picture(1), picture(2))]
    bare = replace(
        data, metrics=metrics, scores=(), history=(), pairs=(), largest=largest, run="runs/mine"
    )
    text = write_report(tmp_path, bare).read_text(encoding="utf-8")
    for words in (
        "were sampled but not scored. The policy puts the winner first in 75% ",
        "[66, 82]</span> of 100 held-out pairs, more often than chance.",
        "policy&#39;s image is: warmer 90% <span",
        "<code>inversion-dpo web runs/mine</code>",
        "<h2>Largest changes",
        "a moved star",
    ):
        assert words in text
    assert "[66, 82] of 100 held-out pairs" in " ".join(lines(metrics, "runs/mine"))
    single = metrics | {"training": training | {"heldout_liked": 50.0}}
    told = "tells liked from disliked in 75% [66, 82] of 100 held-out images"
    assert told in " ".join(lines(single, "runs/mine"))
    assert "<h2>Metrics" not in text and "<h2>Training" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.json", "grid.png", "report.html"]


@pytest.mark.parametrize(("mean", "said"), [(12.34, "12.3 of"), (0.034, "0.03 of"), (0.0, "0 of")])
def test_a_small_distance_is_not_told_as_none(mean: float, said: str) -> None:
    metrics = {"n_prompts": 4, "distance": {"mean": mean, "identical": 0}}
    assert f"Its images are {said} 255 grey levels" in " ".join(lines(metrics, "runs/mine"))


def test_the_largest_changes_are_the_first_images_that_differ_most(tmp_path: Path) -> None:
    shades = ([0, 0, 0, 0, 0, 0], [9, 255, 0, 0, 90, 255])  # three prompts of two images
    files = [tmp_path / "r.parquet", tmp_path / "p.parquet"]
    for file, side in zip(files, shades, strict=True):
        images = [np.full((8, 8, 3), shade, np.uint8) for shade in side]
        write_samples(file, list("aabbcc"), list(range(6)), images, {})
    assert most_changed(files, seeds=2, count=2) == [0, 4]


def bare_of(data: ReportData) -> ReportData:
    """The report without images, and without curves, which take a second to draw."""
    return replace(data, samples=(), scores=(), history=())


def test_report_without_images_has_no_grid(data: ReportData, tmp_path: Path) -> None:
    page = write_report(tmp_path, bare_of(data)).read_text(encoding="utf-8")
    assert "<h2>Samples" not in page and "What else changed" in page
    assert not (tmp_path / "grid.png").exists()


def test_unequal_lists_are_refused(data: ReportData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer"):
        write_report(tmp_path, replace(data, samples=data.samples[:3]))
    with pytest.raises(ValueError, match="shorter"):
        write_report(tmp_path, replace(data, scores=data.scores[:1]))


def test_inline_text_escapes_before_it_marks_up() -> None:
    assert inline_text("`<b>` by -0.1 of held-out") == (
        "<code>&lt;b&gt;</code> by \N{MINUS SIGN}0.1 of held-out"
    )


def test_duration() -> None:
    expected = ["0.4 s", "59.9 s", "1 min 0 s", "1 min 23 s", "1 h 7 min"]
    assert [duration(s) for s in (0.42, 59.94, 59.96, 83, 4000)] == expected


def test_thumbnail_keeps_small_pixels_whole_and_shrinks_large_images() -> None:
    small = picture(0)
    large = figures.thumbnail(picture(1, 600, 300), 128)
    assert np.array_equal(figures.thumbnail(small, 128)[::2, 1::2], small)
    assert large.shape == (128, 64, 3) and large.dtype == np.uint8


def test_grid_shows_every_pixel_of_reference_left_and_policy_right() -> None:
    flat = [np.full((64, 64, 3), c, np.uint8) for c in ((200, 30, 30), (30, 30, 200))]
    pixels = np.asarray(figures.sheet(["a"] * 3, [flat] * 3, columns=2)).astype(int)
    columns = [np.nonzero((pixels == f[0, 0]).all(-1)) for f in flat]
    assert [len(c[0]) for c in columns] == [3 * 128 * 128] * 2
    assert columns[0][1].min() < columns[1][1].min()


def test_curves_skip_rows_without_a_key_and_subtract_the_reference() -> None:
    panel = next(p for p in figures.PANELS if p.title.startswith("error"))
    winner, _, held_out, _ = (figures.points(history(), s) for s in panel.series)
    assert winner[1] == pytest.approx(np.full(60, -0.01))
    assert held_out[0].tolist() == [0, 20, 40]
    assert held_out[1] == pytest.approx([0, -0.02, -0.04])  # no reference: since the first


def test_curves_ignore_values_that_are_no_numbers() -> None:
    rows = [{"step": 0, "loss": float("nan")}, {"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
    steps, values = figures.points(rows, figures.PANELS[0].series[0])
    assert (steps.tolist(), values.tolist()) == ([2], [0.5])


def test_running_mean_by_hand() -> None:
    values = np.array([0.0, 3.0, 6.0, 0.0])
    assert figures.running_mean(values, 3) == pytest.approx([1.5, 3.0, 3.0, 3.0])
    assert figures.running_mean(values, 1) == pytest.approx(values)


def test_what_else_changed_is_read_for_the_reader(page: str) -> None:
    table = page[page.index("What else changed") :]
    row = r"<td>{}</td><td class=\"n\">{}</td><td class=\"n\">.*{}.*</td><td>{}</td>"
    assert re.search(row.format("warmer", "90.0%", r"\[86.0, 94.0\]", "more"), table)
    same = row.format("sharper", "49.0%", r"\[42.0, 56.0\]", "no measurable change")
    assert re.search(same, table)


def test_what_else_changed_is_said_in_the_terminal_and_left_out_if_unknown(
    data: ReportData, tmp_path: Path
) -> None:
    told = lines(data.metrics)[-1]
    assert told == (
        "  policy's images beside the reference's: warmer 90% [86%, 94%] !, sharper 49% [42%, 56%]"
    )
    older = {k: v for k, v in data.metrics.items() if k != "traits"}
    assert "images beside" not in "".join(lines(older))
    bare = replace(bare_of(data), metrics=older)
    assert "What else changed" not in write_report(tmp_path, bare).read_text(encoding="utf-8")
