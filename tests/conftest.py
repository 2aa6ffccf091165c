"""What tests share: no test asks the network for weights, and browser tests get the machine's Chromium or are left out."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from minisd3.text import TextEncoders
    from minisd3.vae import VAE

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The path of a Chromium; without one the browser tests are skipped, with a line that says how to add it."""
    for name in CHROMIUMS:
        if path := shutil.which(name):
            return Path(path)
    pytest.skip("browser tests are left out: no Chromium here. To add it: apt-get install chromium (macOS: brew install --cask chromium)")


@pytest.fixture(scope="module")
def small_vae() -> "VAE":
    """A random one of few channels, for latents of 1/8 of the side."""
    import torch

    from minisd3.config import VAEConfig
    from minisd3.vae import VAE

    torch.manual_seed(0)
    return VAE(VAEConfig(width=8, multipliers=(1, 1, 1, 1), blocks=1, groups=4)).eval()


@pytest.fixture(scope="module")
def tiny_text() -> "TextEncoders":
    """The shipped text encoders."""
    import torch

    from minisd3.config import PRESETS
    from minisd3.text import TextEncoders

    folder = Path(__file__).parents[1] / "minisd3/models/tiny/text_encoders"
    return TextEncoders.load(folder, PRESETS["tiny"].text, dtype=torch.float32)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset with random weights: a folder of sd3_tiny.safetensors, text_encoders/ and control.safetensors."""
    import torch
    from transformers import CLIPTokenizer, T5Tokenizer

    from minisd3 import weights
    from minisd3.config import PRESETS
    from minisd3.controlnet import ControlNet
    from minisd3.mmdit import MMDiT
    from minisd3.text import TextEncoders, clip_tower, t5_tower
    from minisd3.vae import VAE

    folder, preset, text = tmp_path_factory.mktemp("random"), PRESETS["tiny"], PRESETS["tiny"].text
    shipped = Path(__file__).parents[1] / "minisd3/models/tiny/text_encoders"
    assert preset.controlnet is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mmdit, vae, control = MMDiT(preset.mmdit), VAE(preset.vae), ControlNet(preset.controlnet)
        for p in [*mmdit.parameters(), *control.parameters()]:
            torch.nn.init.normal_(p, std=0.05)
        encoders = TextEncoders(
            text,
            clip_l=clip_tower(text.clip_l, text.clip_length),
            clip_g=clip_tower(text.clip_g, text.clip_length),
            t5=t5_tower(text.t5),
            clip_tokenizer=CLIPTokenizer.from_pretrained(shipped / "clip_tokenizer"),
            t5_tokenizer=T5Tokenizer.from_pretrained(shipped / "t5_tokenizer"),
        )
    assert encoders.clip_l is not None
    torch.nn.init.eye_(encoders.clip_l.text_projection.weight)  # SD3 does not project CLIP-L's pooled vector; diffusers does, by this
    weights.save_released(folder / "sd3_tiny.safetensors", mmdit, vae)
    weights.save_released(folder / "control.safetensors", control)
    encoders.save(folder / "text_encoders")
    return folder
