from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from inversion_dpo.graphs.graph import Item, Relation, SceneGraph, set_iou, triples
from inversion_dpo.world.captions import RELATIONS, parse_caption
from inversion_dpo.world.checker import Detected, Detection, SceneScores, detect, score
from inversion_dpo.world.drawing import PALETTE, Scene, sample_scene
from tools.embedded.painting import render

Object = tuple[str, str, str, float, float]  # size, colour, shape, x, y
Spoil = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

RED_CIRCLE: Object = ("small", "red", "circle", 16, 30)
BLUE_SQUARE: Object = ("large", "blue", "square", 46, 34)
GREEN_STAR: Object = ("small", "green", "star", 44, 10)
TWO = parse_caption("a small red circle left of a large blue square")
THREE = parse_caption(
    "a small red circle left of a large blue square which is below a small green star"
)


def paint(*objects: Object, warmth: float = 0.5) -> NDArray[np.uint8]:
    items = tuple(Item(k, o[2], (o[0], o[1])) for k, o in enumerate(objects))
    positions = tuple((float(o[3]), float(o[4])) for o in objects)
    return render(Scene(SceneGraph(items), positions, warmth))


def scores(graph: SceneGraph, *objects: Object) -> SceneScores:
    return score(graph, detect(paint(*objects)))


def at(thing: Object, x: float, y: float) -> Object:
    return (*thing[:3], x, y)


@pytest.fixture(scope="module")
def rendered() -> list[tuple[Scene, NDArray[np.uint8]]]:
    rng = np.random.default_rng(0)
    return [(s, render(s)) for s in (sample_scene(rng) for _ in range(150))]


@pytest.fixture(scope="module")
def checked(
    rendered: list[tuple[Scene, NDArray[np.uint8]]],
) -> list[tuple[Scene, Detected, SceneScores]]:
    found = [(scene, detect(image)) for scene, image in rendered]
    return [(scene, seen, score(scene.graph, seen)) for scene, seen in found]


def test_clean_renders_are_read_exactly(
    checked: list[tuple[Scene, Detected, SceneScores]],
) -> None:
    assert {r.relation for s, _, _ in checked for r in s.graph.relations} == set(RELATIONS)
    assert {len(s.graph.items) for s, _, _ in checked} == {1, 2, 3, 4}
    assert np.mean([scores.exact for _, _, scores in checked]) >= 0.99
    for _, _, scores in checked:
        if scores.exact:
            assert scores.entity_iou == scores.sg_iou == scores.composition == 1.0
            assert scores.relation_iou == 1.0
            assert scores.shape_quality > 0.9


def test_warmth_is_recovered(checked: list[tuple[Scene, Detected, SceneScores]]) -> None:
    for scene, seen, scores in checked:
        assert seen.warmth == scores.warmth == pytest.approx(scene.warmth, abs=0.02)


def test_positions_are_recovered(checked: list[tuple[Scene, Detected, SceneScores]]) -> None:
    for scene, seen, scores in checked:
        if not scores.exact:
            continue
        where = {f"{o.size} {o.colour} {o.label}": (o.x, o.y) for o in seen.objects}
        for item, position in zip(scene.graph.items, scene.positions, strict=True):
            assert where[item.name] == pytest.approx(position, abs=0.5)


def noisy(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    noise = np.random.default_rng(int(image[0, 0, 0])).normal(0, 6, image.shape)
    return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)


def blurred(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.round(ndimage.uniform_filter(image.astype(float), (3, 3, 1))).astype(np.uint8)


@pytest.mark.parametrize("spoil", [noisy, blurred])
def test_mild_spoiling_changes_nothing(
    rendered: list[tuple[Scene, NDArray[np.uint8]]], spoil: Spoil
) -> None:
    results = [(scene, detect(spoil(image))) for scene, image in rendered[:80]]
    assert np.mean([score(scene.graph, seen).exact for scene, seen in results]) >= 0.98
    for scene, seen in results:
        assert seen.warmth == pytest.approx(scene.warmth, abs=0.02)


def test_what_was_asked_scores_one() -> None:
    for graph, objects in ((TWO, 2), (THREE, 3)):
        found = scores(graph, *(RED_CIRCLE, BLUE_SQUARE, GREEN_STAR)[:objects])
        assert (found.entity_iou, found.relation_iou, found.sg_iou, found.exact) == (1, 1, 1, 1)
        assert found.composition == 1
        assert found.shape_quality > 0.95


@pytest.mark.parametrize(
    ("wrong", "relation_iou"),
    [
        (("small", "green", "circle", 16, 30), 1),
        (("large", "red", "circle", 16, 30), 1),
        (("small", "red", "diamond", 16, 30), 0),
    ],
    ids=["colour", "size", "shape"],
)
def test_one_wrong_object_of_two(wrong: Object, relation_iou: float) -> None:
    found = scores(TWO, wrong, BLUE_SQUARE)
    assert found.entity_iou == pytest.approx(1 / 3)  # the square, of circle, square, wrong
    assert found.relation_iou == relation_iou  # by shape alone
    assert found.sg_iou == 0
    assert found.exact == 0
    assert found.composition == pytest.approx(1 / 6)


@pytest.mark.parametrize("position", [(58, 34), (48, 54), (44, 10)])
def test_the_other_side_breaks_the_relation_only(position: tuple[float, float]) -> None:
    found = scores(TWO, at(RED_CIRCLE, *position), at(BLUE_SQUARE, 40, 32))
    assert found.entity_iou == 1
    assert found.relation_iou == found.sg_iou == found.exact == 0
    assert found.composition == 0.5


def test_moving_one_object_leaves_the_other_relation() -> None:
    # circle right of the square, the star still above it: 1 of {asked, asked, found}
    found = scores(THREE, at(RED_CIRCLE, 56, 42), at(BLUE_SQUARE, 30, 42), at(GREEN_STAR, 30, 12))
    assert found.entity_iou == 1
    assert found.sg_iou == found.relation_iou == pytest.approx(1 / 3)
    assert found.exact == 0


def test_swapped_colours_spoil_everything_but_the_shapes() -> None:
    found = scores(TWO, ("small", "blue", "circle", 16, 30), ("large", "red", "square", 46, 34))
    assert found.entity_iou == found.sg_iou == found.exact == 0
    assert found.relation_iou == 1


def test_a_missing_object() -> None:
    found = scores(TWO, RED_CIRCLE)
    assert found.entity_iou == 0.5
    assert found.relation_iou == found.sg_iou == found.exact == 0
    found = scores(THREE, RED_CIRCLE, BLUE_SQUARE)
    assert found.entity_iou == pytest.approx(2 / 3)
    assert found.sg_iou == found.relation_iou == 0.5


def test_an_extra_object_costs_entities_only() -> None:
    found = scores(TWO, RED_CIRCLE, BLUE_SQUARE, GREEN_STAR)
    assert found.entity_iou == pytest.approx(2 / 3)
    assert found.relation_iou == found.sg_iou == 1
    assert found.exact == 0


@pytest.mark.parametrize("colour", [(220, 220, 220), (0, 0, 0), *PALETTE.values()])
def test_an_empty_image_holds_nothing(colour: tuple[int, int, int]) -> None:
    seen = detect(np.full((64, 64, 3), colour, np.uint8))
    assert seen.objects == ()
    found = score(TWO, seen)
    assert found.entity_iou == found.relation_iou == found.sg_iou == found.exact == 0
    assert found.shape_quality == found.composition == 0


def test_any_pixels_at_all_are_scored() -> None:
    rng = np.random.default_rng(0)
    for side in (1, 4, 16):
        blocks = rng.integers(0, 256, (64 // side, 64 // side, 3))
        seen = detect(np.kron(blocks, np.ones((side, side, 1))).astype(np.uint8))
        values = list(vars(score(TWO, seen)).values())
        assert np.isfinite(values).all()
        assert max(values[:5]) <= 1


def test_one_object_alone() -> None:
    graph = parse_caption("a small red circle")
    found = scores(graph, RED_CIRCLE)
    assert (found.entity_iou, found.relation_iou, found.sg_iou, found.exact) == (1, 1, 1, 1)
    wrong = scores(graph, BLUE_SQUARE)
    assert (wrong.entity_iou, wrong.relation_iou, wrong.sg_iou, wrong.exact) == (0, 1, 0, 0)
    twice = scores(graph, RED_CIRCLE, at(RED_CIRCLE, 46, 34))
    assert (twice.entity_iou, twice.sg_iou, twice.exact) == (0.5, 1, 0)


def test_two_objects_of_one_shape_are_no_contradiction() -> None:
    # both "circle left of circle" and its inverse are seen; only one was asked about
    graph = parse_caption("a small red circle left of a large blue circle")
    found = scores(graph, RED_CIRCLE, ("large", "blue", "circle", 46, 34))
    assert (found.entity_iou, found.relation_iou, found.sg_iou, found.exact) == (1, 1, 1, 1)
    below = scores(graph, RED_CIRCLE, ("large", "blue", "circle", 16, 50))
    assert (below.entity_iou, below.relation_iou, below.sg_iou, below.exact) == (1, 0, 0, 0)


def test_a_name_asked_for_twice_can_be_had() -> None:
    graph = parse_caption("a small red circle left of a small red circle")
    found = scores(graph, RED_CIRCLE, at(RED_CIRCLE, 46, 34))
    assert (found.entity_iou, found.sg_iou, found.exact) == (1, 1, 1)


def test_what_is_no_shape_is_a_blob() -> None:
    image = paint(BLUE_SQUARE)
    image[4:8, 4:60] = PALETTE["red"]
    image[50:60, 4] = PALETTE["green"]  # one pixel wide: not an object at all
    objects = detect(image).objects
    assert [(o.label, o.colour) for o in objects] == [("blob", "red"), ("square", "blue")]
    assert objects[0].confidence < 0.7 < objects[1].confidence


@pytest.mark.parametrize("shape", [(32, 32, 3), (64, 64), (3, 64, 64), (64, 64, 4)])
def test_other_image_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="reads pictures of 64x64 pixels"):
        detect(np.zeros(shape, np.uint8))


def test_the_detected_graph_relates_every_ordered_pair() -> None:
    places = ((10.0, 10.0), (30.0, 12.0), (32.0, 50.0))
    seen = Detected(tuple(Detection("star", "small", "red", x, y, 1.0) for x, y in places), 0.0)
    assert set(seen.graph().relations) == {
        Relation(0, "left of", 1),
        Relation(1, "right of", 0),
        Relation(1, "above", 2),
        Relation(2, "below", 1),
        Relation(0, "above", 2),
        Relation(2, "below", 0),
    }


def test_triples_in_words() -> None:
    assert triples(TWO) == [("small red circle", "left of", "large blue square")]
    assert triples(TWO, attributes=False) == [("circle", "left of", "square")]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("", "", 1.0), ("a", "", 0.0), ("aab", "abc", 0.5), ("aa", "a", 0.5), ("ab", "ba", 1.0)],
)
def test_set_iou_counts_repetitions(a: str, b: str, expected: float) -> None:
    assert set_iou(a, b) == set_iou(b, a) == expected
