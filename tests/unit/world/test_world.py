from __future__ import annotations

from itertools import combinations, islice

import numpy as np
import pytest

from inversion_dpo.graphs.graph import Item, SceneGraph
from inversion_dpo.world.captions import COLOURS, RELATIONS, SHAPES, SIZES
from inversion_dpo.world.drawing import (
    COOL_GROUND,
    PALETTE,
    RADIUS,
    WARM_GROUND,
    Scene,
    coverage,
    dominant_relation,
    inside,
    quantise,
    sample_scene,
)
from inversion_dpo.world.scene_prompts import SPLITS, prompts, scenes, split_of
from tools.embedded.painting import draw, render

RNG_SEED = 0


@pytest.fixture(scope="module")
def sampled() -> list[Scene]:
    rng = np.random.default_rng(RNG_SEED)
    return [sample_scene(rng) for _ in range(200)]


def masks(scene: Scene) -> list[np.ndarray]:
    items = zip(scene.graph.items, scene.positions, strict=True)
    return [draw(item.label, item.attributes[0], *position) for item, position in items]


def test_objects_lie_whole_within_the_image(sampled: list[Scene]) -> None:
    for scene in sampled:
        for item, mask in zip(scene.graph.items, masks(scene), strict=True):
            whole = coverage(item.label, item.attributes[0], 0.0, 0.0).sum()
            assert mask.sum() == pytest.approx(whole, rel=0.02)
            assert mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum() == 0


def test_objects_do_not_overlap(sampled: list[Scene]) -> None:
    for scene in sampled:
        assert np.sum(masks(scene), axis=0).max() <= 1.0
        radii = [RADIUS[i.attributes[0]] for i in scene.graph.items]
        for (p, r), (q, s) in combinations(zip(scene.positions, radii, strict=True), 2):
            assert np.hypot(p[0] - q[0], p[1] - q[1]) >= r + s + 2


def test_objects_of_a_scene_are_distinct(sampled: list[Scene]) -> None:
    assert all(len({i.name for i in s.graph.items}) == len(s.graph.items) for s in sampled)


def test_what_a_caption_states_is_so_and_clear(sampled: list[Scene]) -> None:
    for scene in sampled:
        for r in scene.graph.relations:
            (x1, y1), (x2, y2) = scene.positions[r.item1], scene.positions[r.item2]
            along = {
                "left of": x2 - x1,
                "right of": x1 - x2,
                "above": y2 - y1,
                "below": y1 - y2,
            }[r.relation]
            across = abs(y2 - y1) if r.relation in ("left of", "right of") else abs(x2 - x1)
            assert along >= across + 4


def test_samples_are_varied_and_repeatable(sampled: list[Scene]) -> None:
    items = [item for s in sampled for item in s.graph.items]
    assert {item.label for item in items} == set(SHAPES)
    assert {item.attributes for item in items} == {(s, c) for s in SIZES for c in COLOURS}
    assert {r.relation for s in sampled for r in s.graph.relations} == set(RELATIONS)
    assert {len(s.graph.items) for s in sampled} == {1, 2, 3, 4}
    warmth = [s.warmth for s in sampled]
    assert min(warmth) < 0.1 and max(warmth) > 0.9
    assert sample_scene(np.random.default_rng(RNG_SEED)) == sampled[0] != sampled[1]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_number_of_objects_can_be_asked_for(count: int) -> None:
    scene = sample_scene(np.random.default_rng(3), count)
    assert len(scene.graph.items) == len(scene.positions) == len(scene.graph.relations) + 1 == count


def test_a_scene_is_painted_in_its_colours() -> None:
    graph = SceneGraph(
        (Item(0, "square", ("large", "green")), Item(1, "circle", ("small", "pink")))
    )
    cool = render(Scene(graph, ((20.0, 20.0), (45.0, 40.0)), 0.0))
    warm = render(Scene(graph, ((20.0, 20.0), (45.0, 40.0)), 1.0))
    assert cool.shape == (64, 64, 3)
    assert cool.dtype == np.uint8
    for image, ground in ((cool, COOL_GROUND), (warm, WARM_GROUND)):
        assert tuple(image[20, 20]) == PALETTE["green"]  # row y, column x
        assert tuple(image[40, 45]) == PALETTE["pink"]
        assert tuple(image[20, 45]) == tuple(image[0, 0]) == ground


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi * 0.92**2),
        ("square", (2 * 0.82) ** 2),
        ("triangle", 0.56 * 1.8**2),
        ("diamond", 2.0),
        ("star", 5 * 1.08 * 0.46 * np.sin(np.pi / 5)),
        ("cross", 2 * (0.64 * 1.9) - 0.64**2),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_shapes_have_their_area(shape: str, area: float, size: str) -> None:
    for phase in (-0.5, 0.0, 0.25):
        covered = coverage(shape, size, phase, phase).sum()
        assert covered == pytest.approx(area * RADIUS[size] ** 2, rel=0.04)


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="unknown shape 'hexagon'; one of circle"):
        inside("hexagon", np.zeros(1), np.zeros(1))


@pytest.mark.parametrize("x", [0.0, 31.5, 31.49, 17.13, 62.9])
def test_positions_are_rounded_to_a_quarter_pixel(x: float) -> None:
    pixel, phase = quantise(x)
    assert pixel + phase == pytest.approx(x, abs=0.125)
    assert -0.5 <= phase < 0.5


def test_drawing_is_centred_and_cut_at_the_border() -> None:
    rows, cols = np.indices((64, 64))
    whole = draw("circle", "large", 30.25, 21.5)
    centre = (cols * whole).sum() / whole.sum(), (rows * whole).sum() / whole.sum()
    assert centre == pytest.approx((30.25, 21.5), abs=0.05)
    assert draw("circle", "large", -0.5, 31.0).sum() == pytest.approx(whole.sum() / 2, rel=0.01)
    assert draw("circle", "large", -50.0, 500.0).sum() == 0


@pytest.mark.parametrize(
    ("b", "expected"),
    [((9, 3), "left of"), ((-9, 3), "right of"), ((3, 9), "above"), ((-3, -9), "below")],
)
def test_the_longer_axis_names_the_relation(b: tuple[float, float], expected: str) -> None:
    assert dominant_relation((0, 0), b) == expected
    assert dominant_relation((0, 0), b, clear=6) == expected
    assert dominant_relation((0, 0), b, clear=6.1) is None


def test_the_split_of_a_caption_never_changes() -> None:
    assert split_of("a small red circle") == "train"
    assert split_of("a small blue circle") == "validation"
    assert split_of("a large green triangle") == "test"


def test_splits_have_their_share() -> None:
    captions = [f"caption {k}" for k in range(4000)]
    share = {split: sum(split_of(c) == split for c in captions) / 4000 for split in SPLITS}
    assert share["train"] == pytest.approx(0.9, abs=0.02)
    assert share["validation"] == pytest.approx(0.05, abs=0.015)
    assert share["test"] == pytest.approx(0.05, abs=0.015)


def test_prompts_are_distinct_and_of_their_split() -> None:
    sets = {split: [g.caption for g in prompts(split, 20)] for split in SPLITS}
    for split, captions in sets.items():
        assert len(set(captions)) == 20
        assert {split_of(caption) for caption in captions} == {split}
        assert captions == [g.caption for g in prompts(split, 20)]
    assert len(set().union(*sets.values())) == 60


def test_scene_streams_are_seeded() -> None:
    first, again, other = (list(islice(scenes("test", seed), 3)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    with pytest.raises(ValueError, match="unknown split 'dev'; one of train, validation, test"):
        next(scenes("dev", 0))
