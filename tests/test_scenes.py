from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn.functional import max_pool2d

from minisd3.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    KINDS,
    PHRASINGS,
    PROMPTS,
    RELATIONS,
    SIZES,
    VARIATIONS,
    VOCABULARY,
    Scene,
    Thing,
    _backdrop,
    captions,
    held_out,
    pictures,
    scene,
)


def test_a_seed_gives_the_same_scene_for_ever() -> None:
    assert scene(0).caption() == "a purple house by the sea"
    assert scene(2).caption() == "a blue fish to the right of a white balloon by the sea"
    assert scene(14).caption() == "an orange car, an orange tree and a pink house in a meadow"
    thing = scene(9).things[0]
    assert (round(thing.x, 6), round(thing.y, 6), round(thing.size, 6)) == (0.442162, 0.556154, 0.539331)


def test_a_seed_gives_the_same_picture_for_ever() -> None:
    picture = np.asarray(Scene("snow", (Thing("tree", "red"),)).render()).astype(int)
    known = {
        (4, 4): (152, 168, 197),
        (120, 64): (219, 230, 244),
        (52, 64): COLOURS["red"],
        (76, 64): (177, 37, 46),
        (91, 64): (124, 80, 50),
    }
    for (y, x), rgb in known.items():  # a little room for another Pillow's rounding
        assert np.abs(picture[y, x] - rgb).max() <= 3, (y, x, picture[y, x])
    assert (pictures([5, 6]) == pictures([5, 6])).all()


def test_pictures_are_the_rendered_scenes() -> None:
    batch = pictures([7, HELD_OUT + 7], 96, 160)
    assert batch.shape == (2, 3, 96, 160) and batch.dtype == torch.float32
    pixels = torch.from_numpy(np.array(scene(7).render(96, 160))).permute(2, 0, 1)
    assert torch.equal(((batch[0] + 1) * 127.5).round().byte(), pixels)


@pytest.mark.parametrize("sides", [(128, 128), (96, 192), (192, 112)])
@pytest.mark.parametrize("seed", range(40))
def test_masks_are_where_the_picture_differs_from_its_background(seed: int, sides: tuple[int, int]) -> None:
    drawn = scene(seed)
    masks = drawn.masks(*sides)
    assert masks.shape == (len(drawn.things), *sides)
    bare = _backdrop(drawn.background, drawn.variation, *sides)[0].astype(int)
    differs = torch.from_numpy(np.abs(np.asarray(drawn.render(*sides)).astype(int) - bare).max(-1) > 0)
    within = max_pool2d(masks.any(0).float()[None, None], 3, 1, 1)[0, 0] > 0  # a pixel's reach: the anti-aliased rim
    assert not (differs & ~within).any()
    assert (differs & masks.any(0)).sum() >= 0.98 * masks.any(0).sum()


@pytest.mark.parametrize("sides", [(128, 128), (96, 192), (192, 96)])
def test_objects_stay_apart_and_inside(sides: tuple[int, int]) -> None:
    for seed in range(300):
        boxes = [thing.placed(*sides) for thing in scene(seed).things]
        for left, top, side in boxes:
            assert left >= -1 and top >= -1 and left + side <= sides[1] + 1 and top + side <= sides[0] + 1
        for (left, top, side), (left2, top2, side2) in combinations(boxes, 2):
            assert left + side <= left2 or left2 + side2 <= left or top + side <= top2 or top2 + side2 <= top


def test_depth_is_each_objects_own_on_its_mask() -> None:
    for seed in range(30):
        drawn = scene(seed)
        depth, masks = drawn.depth(128, 96), drawn.masks(128, 96)
        assert depth.shape == (1, 128, 96) and depth.dtype == torch.float32
        for thing, mask in zip(drawn.things, masks, strict=True):
            assert (depth[0][mask] == pytest.approx(thing.depth)) and 0.5 < thing.depth <= 1
        outside = depth[0][~masks.any(0)]
        assert outside.min() >= 0 and outside.max() <= 0.4
    small, big = (Scene("night", (Thing("car", "red", size=size),)).depth().max() for size in (0.45, 0.65))
    assert small < big


def test_a_later_object_hides_an_earlier_one() -> None:
    masks = Scene("sea", (Thing("house", "red"), Thing("star", "blue")), "left").masks()
    assert masks.any((1, 2)).all() and not (masks[0] & masks[1]).any()


def test_captions_name_everything_in_a_small_vocabulary() -> None:
    assert len(VOCABULARY) < 100
    spoken = set()
    for seed in range(600):
        told = scene(seed)
        for phrasing in range(PHRASINGS):
            words = told.caption(phrasing).replace(",", " ,").split()
            assert len(words) <= 18 and set(words) <= set(VOCABULARY)
            assert {word for thing in told.things for word in (thing.kind, thing.colour)} <= set(words)
            assert any(phrase in told.caption(phrasing) for phrase in BACKGROUNDS[told.background].phrases)
            assert ("an orange" in told.caption(phrasing)) == ("an" in words) and "a orange" not in told.caption(phrasing)
            spoken.update(words)
    assert spoken == set(VOCABULARY)
    assert captions([3, 4]) == captions([3, 4]) and len(set(captions(range(40)))) > 30


def test_relations_are_true() -> None:
    seen = set()
    for seed in range(400):
        told = scene(seed)
        if told.relation is None:
            continue
        seen.add(told.relation)
        first, second = told.things
        across, down = second.x - first.x, second.y - first.y
        truth = {"left": across, "right": -across, "above": down, "below": -down}
        assert max(truth, key=lambda relation: truth[relation]) == told.relation
        assert told.caption(6).startswith(("a " + second.colour, "an " + second.colour))
    assert seen == set(RELATIONS)
    pair = Scene("night", (Thing("house", "red", 0.3), Thing("tree", "blue", 0.7)), "left")
    assert pair.caption(0) == "a red house to the left of a blue tree at night"
    assert pair.caption(6) == "a blue tree to the right of a red house at night"


def test_sizes_and_places_are_told_when_clear() -> None:
    assert Scene("sea", (Thing("fish", "orange", size=0.46),)).caption(4) == "a small orange fish by the sea"
    assert Scene("sea", (Thing("fish", "orange", size=0.64),)).caption(4) == "a big orange fish by the sea"
    assert Scene("sea", (Thing("fish", "orange", size=0.55),)).caption(4) == "an orange fish by the sea"
    spots = {(0.3, 0.5): "on the left", (0.7, 0.5): "on the right", (0.5, 0.3): "at the top", (0.5, 0.7): "at the bottom"}
    for (x, y), place in spots.items():
        assert Scene("sea", (Thing("fish", "red", x, y),)).caption(6) == f"a red fish {place} by the sea"
    assert Scene("sea", (Thing("fish", "red"),)).caption(7) == "a red fish in the middle near the water"
    assert Scene("sea", (Thing("fish", "red", 0.35, 0.35),)).caption(6) == "a red fish by the sea"


def test_scenes_are_as_varied_as_promised() -> None:
    drawn = [scene(seed) for seed in range(3000)]
    shares = [sum(len(s.things) == n for s in drawn) / len(drawn) for n in (1, 2, 3)]
    assert shares == pytest.approx([0.60, 0.32, 0.08], abs=0.03)
    assert {s.background for s in drawn} == set(BACKGROUNDS) and {s.variation for s in drawn} == set(range(VARIATIONS))
    things = [(len(s.things), thing) for s in drawn for thing in s.things]
    assert {(t.kind, t.colour) for _, t in things} == {(kind, colour) for kind in KINDS for colour in COLOURS}
    assert all(SIZES[n][0] <= t.size <= SIZES[n][1] for n, t in things)
    assert all(len({(t.kind, t.colour) for t in s.things}) == len(s.things) for s in drawn)


def _reserved(drawn: Scene) -> list[bool]:
    return [held_out(thing.kind, thing.colour, drawn.background) for thing in drawn.things]


def test_training_never_shows_what_is_held_out() -> None:
    triples = [(k, c, b) for k in KINDS for c in COLOURS for b in BACKGROUNDS]
    assert sum(held_out(*triple) for triple in triples) == len(COLOURS) * len(BACKGROUNDS)
    assert not any(any(_reserved(scene(seed))) for seed in [*range(3000), *range(HELD_OUT - 500, HELD_OUT)])
    assert any(any(_reserved(scene(seed))) for seed in range(HELD_OUT, HELD_OUT + 200))


def test_prompts_are_held_out_and_cover_the_world() -> None:
    assert len(PROMPTS) == len({prompt.caption() for prompt in PROMPTS}) == 32
    assert [len(prompt.things) for prompt in PROMPTS] == [1] * 24 + [2] * 8
    assert all(all(_reserved(prompt)) for prompt in PROMPTS)
    things = [thing for prompt in PROMPTS for thing in prompt.things]
    assert {t.kind for t in things} == set(KINDS) and {t.colour for t in things} == set(COLOURS)
    assert {p.background for p in PROMPTS} == set(BACKGROUNDS) and {p.relation for p in PROMPTS[24:]} == set(RELATIONS)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda: Thing("cat", "red"), "'cat'; choose one of house"),
        (lambda: Thing("car", "teal"), "'teal'; choose one of red"),
        (lambda: Thing("car", "red", size=1.5), "1.5"),
        (lambda: Scene("space", (Thing("car", "red"),)), "'space'; choose one of meadow"),
        (lambda: Scene("snow", ()), "0 things"),
        (lambda: Scene("snow", (Thing("car", "red"), Thing("car", "blue"))), "None with 2 things"),
        (lambda: Scene("snow", (Thing("car", "red"),), "left"), "'left' with 1 things"),
        (lambda: scene(1).render(100, 128), "height is 100"),
        (lambda: scene(1).masks(128, 208), "width is 208"),
        (lambda: scene(1).caption(PHRASINGS), "phrasing is 12"),
        (lambda: scene(-1), "seed is -1"),
    ],
)
def test_wrong_input_says_what_is_right(wrong: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        wrong()
