"""The shipped `tiny` model does what the README and its card say of it."""

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import minisd3
from minisd3 import scenes, scores
from minisd3.controlnet import HINTS, canny, depth
from minisd3.evaluate import CaptionAccuracy, caption_accuracy, edge_f1, grid, psnr
from minisd3.family import STEPS
from minisd3.pipeline import SD3, from_pil
from minisd3.weights import load_vae

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "minisd3" / "models" / "tiny"


@cache
def tiny() -> SD3:
    return minisd3.load()


@cache
def drawn() -> Tensor:
    """(32 3 128 128): every fixed prompt, seeds 0 to 31, with the preset's settings; as `evaluate --out` draws them."""
    pictures = []
    for i, scene in enumerate(scenes.PROMPTS):
        pictures += tiny().generate(scene.caption(), seed=i, progress=False)
    return torch.cat([from_pil(picture, (128, 128)) for picture in pictures])


@cache
def accuracy() -> CaptionAccuracy:
    return caption_accuracy(drawn(), scenes.PROMPTS)


def held_out(n: int, height: int = 128, width: int = 128) -> Tensor:
    return scenes.pictures(range(scenes.HELD_OUT, scenes.HELD_OUT + n), height, width)


def test_backgrounds_are_right() -> None:
    assert accuracy().background.share >= 0.95


def test_nearly_all_prompts_are_recognised_in_their_colours_and_related() -> None:
    assert accuracy().recognised.share >= 0.9
    assert accuracy().relation.share >= 0.75  # of 8


def sixteen(**settings: Any) -> CaptionAccuracy:
    """What is right in sixteen of the fixed prompts, drawn with these settings."""
    asked = scenes.PROMPTS[::2]
    pictures = tiny().generate([scene.caption() for scene in asked], seed=range(16), progress=False, **settings)
    return caption_accuracy(torch.cat([from_pil(picture, picture.size[::-1]) for picture in pictures]), asked)


@pytest.mark.parametrize("size", [(96, 192), (192, 96), (160, 160)])
def test_other_sizes_are_drawn_too(size: tuple[int, int]) -> None:
    accuracy = sixteen(size=size)
    assert accuracy.recognised.share >= 0.75 and accuracy.background.share >= 0.9


def test_four_steps_are_recognisable() -> None:
    assert sixteen(steps=4, sampler="euler", shift=3.0).thing.share >= 0.6


def test_the_readme_shows_what_the_weights_draw() -> None:
    shown = np.asarray(Image.open(ROOT / "docs" / "prompts.png").convert("RGB"), dtype=float)
    again = np.asarray(grid(drawn()), dtype=float)
    assert shown.shape == again.shape
    assert np.abs(shown - again).mean() < 1  # another processor rounds otherwise


@torch.no_grad()
def test_the_vae_reconstructs_held_out_scenes() -> None:
    image = held_out(32)
    again = tiny().vae.decode(tiny().vae.encode(image)[0]).clamp(-1, 1)
    assert psnr(again, image).mean() >= 32


@torch.no_grad()
def test_more_latent_channels_reconstruct_better() -> None:
    image = held_out(16)
    sisters = [load_vae(FOLDER / f"vae_{channels}.safetensors", dtype=torch.float32) for channels in (4, 8)]
    four, eight, sixteen = (psnr(vae.decode(vae.encode(image)[0]).clamp(-1, 1), image).mean() for vae in (*sisters, tiny().vae))
    assert four + 1 < eight and eight + 0.2 < sixteen


@torch.no_grad()
def test_normalised_latents_have_a_spread_near_one() -> None:
    latent = tiny().vae.normalize(tiny().vae.encode(held_out(64))[0])
    assert latent.mean().abs() < 0.05
    assert latent.std() == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_tiles_of_a_large_picture_show_no_seams() -> None:
    scene = held_out(4, 192, 192)
    latent = tiny().vae.encode(torch.cat([torch.cat([scene[0], scene[1]], 2), torch.cat([scene[2], scene[3]], 2)], 1)[None])[0]
    whole, tiled = tiny().vae.decode(latent), tiny().vae.decode_tiled(latent, tile=32, overlap=8)  # (1 3 384 384)
    assert (whole - tiled).abs().mean() * 127.5 < 1  # grey levels


@torch.no_grad()
@pytest.mark.parametrize("kind", ["canny", "blur", "depth"])
def test_a_controlnet_is_obeyed_more_the_stronger_it_is(kind: str) -> None:
    seeds = range(scenes.HELD_OUT, scenes.HELD_OUT + 8)
    asked, pictures = [scenes.scene(seed) for seed in seeds], scenes.pictures(seeds)
    hints = depth(torch.stack([scene.depth() for scene in asked])) if kind == "depth" else HINTS[kind](pictures)
    sd3 = minisd3.load(controlnet=kind)
    followed = []
    for strength in (0.0, 1.0):
        drawn = [
            sd3.generate(scene.caption(), seed=i, steps=12, control=hints[i : i + 1], control_strength=strength, progress=False)[0]
            for i, scene in enumerate(asked)
        ]
        images = torch.cat([from_pil(picture, (128, 128)) for picture in drawn])
        followed.append(edge_f1(canny(images), canny(pictures)).f1.mean().item())
    assert followed[1] > max(0.6, followed[0] + 0.1)
    assert caption_accuracy(images, asked).recognised.share >= 0.7  # the prompt still rules kinds and colours


def test_it_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 60e6


@pytest.mark.parametrize(
    ("name", "choices"), [("cfg", scores.cfg_choices(4.0)), ("slg", scores.slg_choices(4.0, 6)), ("slg", scores.slg_choices(1.0, 6))]
)
def test_the_tables_of_guidances_are_whole_and_of_these_weights(name: str, choices: list[scores.Guidance]) -> None:
    made, rows = scores.read_table(FOLDER / f"{name}.jsonl")
    assert made["transformer"] == scores.fingerprint(tiny().mmdit)
    assert [one for one in rows if one in choices] == choices


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("tools.card")


def test_the_page_of_guidances_shows_these_tables(card: ModuleType) -> None:
    assert card.guidance() == (FOLDER / "guidance.md").read_text()


def test_a_log_is_thinned_by_rounds(card: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, "mmdit", (10, 30))
    lines = [json.dumps({"step": i, "loss": float(i), "seconds": 2.0 * i}) for i in range(1, 31)]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines))
    first, *_, last = thinned = [json.loads(line) for line in card.training(log).splitlines()]
    assert [line["round"] for line in thinned] == [1, 2, 2]
    assert first == {"round": 1, "step": 10, "loss": 5.5, "highest": 10.0, "seconds": 20} and last["step"] == 30
    log.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="has 29 steps and the recipe 30"):
        card.training(log)


def test_the_log_of_training_is_of_the_recipe() -> None:
    log = [json.loads(line) for line in (FOLDER / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(10, STEPS["mmdit"][-1] + 1, 10))
    assert {line["round"]: line["step"] for line in log} == dict(enumerate(STEPS["mmdit"], 1))
