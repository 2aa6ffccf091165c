"""The tiny family's tokenizers and text encoders: what the shipped ones can do, and that their training teaches it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

import minisd3
from minisd3 import recipes, scenes
from minisd3.config import PRESETS
from minisd3.scenes import HELD_OUT, Scene, Thing
from minisd3.text import ImageTower, TextEncoders, clip_tower, read_clip, t5_tower

FOLDER = Path(minisd3.__file__).parent / "models/tiny/text_encoders"
CONFIG = PRESETS["tiny"].text
CLIPS = ["clip_l", "clip_g"]


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    return TextEncoders.load(FOLDER, CONFIG, dtype=torch.float32)


@pytest.fixture(scope="module")
def image_towers() -> dict[str, ImageTower]:
    towers = {name: ImageTower(getattr(CONFIG, name).width) for name in CLIPS}
    for name, tower in towers.items():
        tower.load_state_dict(load_file(FOLDER / f"image_{name[-1]}.safetensors"))
    return towers


@torch.no_grad()
def embed(encoders: TextEncoders, name: str, captions: Sequence[str]) -> Tensor:
    ids = torch.tensor([getattr(encoders.tokenize(caption), name).ids for caption in captions])
    return F.normalize(read_clip(getattr(encoders, name), ids, project=getattr(CONFIG, name).project)[1], dim=-1)


# --- the shipped ones --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_captions_find_their_pictures(encoders: TextEncoders, image_towers: dict[str, ImageTower], name: str) -> None:
    seeds = range(HELD_OUT, HELD_OUT + 100)
    images = F.normalize(image_towers[name](scenes.pictures(seeds)), dim=-1)
    best = (embed(encoders, name, scenes.captions(seeds)) @ images.T).argmax(1)
    assert (best == torch.arange(100)).sum() >= 90


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_a_picture_knows_its_colours(encoders: TextEncoders, image_towers: dict[str, ImageTower], name: str) -> None:
    """Of two captions, one with another colour for one of two objects. (Which object has which colour these towers hardly know.)"""
    pairs = [scene for seed in range(HELD_OUT, HELD_OUT + 100) if len((scene := scenes.scene(seed)).things) == 2]
    turned = list(scenes.COLOURS)[1:] + list(scenes.COLOURS)[:1]
    next_colour = dict(zip(scenes.COLOURS, turned, strict=True))
    others = [replace(s, things=(replace(s.things[0], colour=next_colour[s.things[0].colour]), s.things[1])) for s in pairs]
    true, false = (embed(encoders, name, [scene.caption() for scene in some]) for some in (pairs, others))
    images = F.normalize(image_towers[name](scenes.rendered(pairs)), dim=-1)
    assert (((true - false) * images).sum(1) > 0).float().mean() >= 0.85


@torch.no_grad()
def test_t5_ties_colours_to_things(encoders: TextEncoders) -> None:
    """A linear map, fitted here, reads an object's colour from the vector of the word that names its kind."""
    x, colour = kinds_and_colours(encoders, range(150))
    x_held, colour_held = kinds_and_colours(encoders, range(HELD_OUT, HELD_OUT + 60))
    ridge = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ F.one_hot(colour, len(scenes.COLOURS)).float())
    assert ((x_held @ ridge).argmax(1) == colour_held).float().mean() >= 0.9


def kinds_and_colours(encoders: TextEncoders, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """T5's vector of each word that names a kind (n D+1, the last a one), and the number of its object's colour (n)."""
    assert encoders.t5 is not None
    rows = [row for caption in scenes.captions(seeds) if (row := encoders.tokenize(caption).t5)]
    states = encoders.t5(torch.tensor([row.ids for row in rows])).last_hidden_state
    colours = torch.tensor(
        [recipes._grounds(scenes.scene(seed), row)[:2] for seed, row in zip(seeds, rows, strict=True)]
    )  # (B 2 L)
    named = torch.tensor([[piece.removeprefix("▁") in scenes.KINDS for piece in row.pieces] for row in rows])
    x = states[named]
    return torch.cat([x, torch.ones(len(x), 1)], dim=1), colours[:, 1][named]


def test_the_transformer_gets_numbers_of_ordinary_size(encoders: TextEncoders) -> None:
    context, pooled = encoders.encode(scenes.captions(range(HELD_OUT, HELD_OUT + 32)))
    n, l, g = CONFIG.clip_length, CONFIG.clip_l.width, CONFIG.clip_l.width + CONFIG.clip_g.width
    for part in context[:, :n, :l], context[:, :n, l:g], context[:, n:], pooled[:, :l], pooled[:, l:]:
        assert 0.3 < part.std() < 3


def test_every_word_of_a_caption_is_one_token(encoders: TextEncoders) -> None:
    for name in CLIPS:
        assert len(getattr(encoders.tokenize(" ".join(scenes.VOCABULARY[:18])), name).cut) == 0
    assert encoders.clip_tokenizer is not None and encoders.t5_tokenizer is not None
    assert all(len(encoders.clip_tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in scenes.VOCABULARY)
    assert all(
        len(encoders.t5_tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in scenes.VOCABULARY if word != ","
    )
    longest = max((scene.caption(i) for scene in scenes.PROMPTS for i in range(scenes.PHRASINGS)), key=len)
    tokens = encoders.tokenize(longest)
    assert all(row is not None and not row.cut for row in tokens)


def test_any_text_has_tokens(encoders: TextEncoders) -> None:
    assert encoders.clip_tokenizer is not None and encoders.t5_tokenizer is not None
    text = "An Elephant's über-house, 3 × 4!"
    assert encoders.clip_tokenizer.decode(encoders.clip_tokenizer(text, add_special_tokens=False).input_ids) == (
        "an elephant 's über - house , 3 × 4 !"
    )
    assert (
        encoders.t5_tokenizer.decode(encoders.t5_tokenizer("An Elephant's house, 3!").input_ids[:-1]) == "an elephant's house, 3!"
    )


def test_the_files_are_small_and_in_half_precision() -> None:
    for path in FOLDER.glob("*.safetensors"):
        assert path.stat().st_size < 4e6
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert all((FOLDER / f"image_{which}.safetensors").stat().st_size < 2e6 for which in "lg")


# --- how they were trained ----------------------------------------------------------------------------------------------------------


def test_tokenizers_can_be_trained_anew(tmp_path: Path) -> None:
    recipes.train_tokenizers(tmp_path)
    clip, t5 = CLIPTokenizer.from_pretrained(tmp_path / "clip_tokenizer"), T5Tokenizer.from_pretrained(tmp_path / "t5_tokenizer")
    assert len(clip) == clip.eos_token_id + 1 == CONFIG.clip_l.vocab and clip.convert_ids_to_tokens(0) == "!"
    assert len(t5) == CONFIG.t5.vocab and t5.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert all(len(clip(word).input_ids) == 3 and (len(t5(word).input_ids) == 2 or word == ",") for word in scenes.VOCABULARY)


def test_contrastive_loss_in_closed_form() -> None:
    logits = torch.tensor([[2.0, 0.0, 5.0], [1.0, 3.0, 0.0], [5.0, 1.0, 2.0]])
    expected = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    torch.testing.assert_close(recipes.contrastive_loss(logits, ["a", "b", "c"]), expected)
    cut = logits.clone()
    cut[0, 2] = cut[2, 0] = -1e9  # 0 and 2 say the same, so neither is the other's wrong answer
    expected = (F.cross_entropy(cut, torch.arange(3)) + F.cross_entropy(cut.T, torch.arange(3))) / 2
    torch.testing.assert_close(recipes.contrastive_loss(logits, ["a", "b", "a"]), expected)


def test_rivals_differ_in_one_respect() -> None:
    rng, bases = Random(0), [scenes.scene(seed) for seed in range(300)]
    for base in bases:
        other = recipes.rival(base, rng)
        assert (other.background, other.relation, len(other.things)) == (base.background, base.relation, len(base.things))
        assert not any(scenes.held_out(thing.kind, thing.colour, base.background) for thing in other.things)
        assert [(t.x, t.y, t.size) for t in other.things] == [(t.x, t.y, t.size) for t in base.things]
    changed = [recipes.rival(base, rng) != base for base in bases]
    assert sum(changed) / len(changed) > 0.8  # an exchange of equal colours changes nothing


def test_grounding_marks_the_words_of_each_thing(encoders: TextEncoders) -> None:
    red, blue = Thing("fish", "red", 0.3, 0.4, 0.4), Thing("boat", "blue", 0.7, 0.4, 0.35)
    scene = Scene("sea", (red, blue), "left")
    row = encoders.tokenize(scene.caption(6)).t5  # told from the boat's side
    assert row is not None and row.pieces[:10] == ["▁a", "▁blue", "▁boat", "▁to", "▁the", "▁right", "▁of", "▁a", "▁red", "▁fish"]
    kinds, colours, backgrounds, places = recipes._grounds(scene, row)
    boat, fish, none = list(scenes.KINDS).index("boat"), list(scenes.KINDS).index("fish"), -100
    assert kinds[:10] == [none, boat, boat, none, none, none, none, none, fish, fish]
    assert colours[1] == list(scenes.COLOURS).index("blue") and places[9] == [0.3, 0.4, 0.4]
    assert [background == none for background in backgrounds] == row.pads


def small(name: str, encoders: TextEncoders) -> TextEncoders:
    clip = replace(CONFIG.clip_l, width=32, layers=2, heads=2)
    config = replace(CONFIG, clip_l=clip, t5=replace(CONFIG.t5, width=224, layers=1, heads=2, head_dim=8, hidden=32))
    tower = clip_tower(clip, config.clip_length) if name == "clip_l" else t5_tower(config.t5)
    return TextEncoders(config, **{name: tower}, clip_tokenizer=encoders.clip_tokenizer, t5_tokenizer=encoders.t5_tokenizer)  # type: ignore[arg-type]


def test_training_lowers_the_losses(encoders: TextEncoders, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip, t5, image = small("clip_l", encoders), small("t5", encoders), ImageTower(32, width=8)
    losses = [p.loss for p in recipes.train_clip(clip, "clip_l", image, tmp_path / "clip", steps=12, batch=16, lr=1e-2)]
    assert sum(losses[-3:]) < sum(losses[:3])
    losses = [p.loss for p in recipes.train_t5(t5, tmp_path / "t5", steps=12, batch=16, lr=1e-2)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
