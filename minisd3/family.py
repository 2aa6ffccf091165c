"""The tiny family in training: a folder with a run for each part, the data they learn from, and the model made of them.

A part that the folder has no checkpoint of is the package's, so that each can be trained by itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTokenizer, T5Tokenizer

from minisd3 import recipes
from minisd3.config import PRESETS, ControlNetConfig
from minisd3.controlnet import ControlNet
from minisd3.detector import Detector, detector_loss
from minisd3.formats import write
from minisd3.mmdit import MMDiT
from minisd3.pipeline import MODELS
from minisd3.text import ImageTower, TextEncoders, clip_tower, t5_tower
from minisd3.training import Progress, averaged, fit
from minisd3.vae import VAE
from minisd3.weights import load_mmdit, load_vae, save_released

CONTROLNETS = ("canny", "blur", "depth")
STEPS: dict[str, tuple[int, ...]] = {
    "vae": (1750,), "vae_4": (1750,), "vae_8": (1750,), "clip_l": (245,), "clip_g": (220,), "t5": (400,), "mmdit": (3000, 6000),
    "controlnet_canny": (600,), "controlnet_blur": (600,), "controlnet_depth": (600,), "detector": (500,),
}  # in the order of training; after each number the learning rate has come down to 0, and goes up again if there is another  # fmt: skip
PRESET = PRESETS["tiny"]
SHIPPED = MODELS / "tiny"
SIDES = (
    (96, 96),
    (96, 144),
    (144, 96),
    (96, 192),
    (192, 96),
    (128, 160),
    (160, 128),
    (128, 192),
    (192, 128),
    (160, 160),
    (192, 192),
)
DATA = ("latents", *(f"latents_{height}x{width}" for height, width in SIDES), *(f"hints_{kind}" for kind in CONTROLNETS))


@dataclass(frozen=True)
class Family:
    """The runs in `folder`; modules are made on `device`, new ones from `seed`, and the transformer learns from so many scenes."""

    folder: Path
    device: torch.device
    seed: int = 0
    scenes: int = 19_000

    def trainer(self, part: str) -> Callable[..., Iterator[Progress]]:
        """What trains a part of STEPS, with a new module and the old ones that it needs: called with steps, and maybe batch and lr."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            kind, _, variant = part.partition("_")
            return partial(getattr(self, f"_{kind}_trainer")(*filter(None, [variant])), self.folder / part, seed=self.seed)

    def _vae_trainer(self, channels: str = "16") -> Callable[..., Iterator[Progress]]:
        return partial(recipes.train_vae, VAE(replace(PRESET.vae, latent_channels=int(channels))).to(self.device))

    def _clip_trainer(self, which: Literal["l", "g"]) -> Callable[..., Iterator[Progress]]:
        name: Literal["clip_l", "clip_g"] = "clip_l" if which == "l" else "clip_g"
        config = getattr(PRESET.text, name)
        tower: dict[str, Any] = {name: clip_tower(config, PRESET.text.clip_length)}
        tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "text_encoders" / "clip_tokenizer")
        encoders = TextEncoders(PRESET.text, clip_tokenizer=tokenizer, **tower).to(self.device)
        return partial(recipes.train_clip, encoders, name, ImageTower(config.width).to(self.device))

    def _t5_trainer(self) -> Callable[..., Iterator[Progress]]:
        tokenizer = T5Tokenizer.from_pretrained(SHIPPED / "text_encoders" / "t5_tokenizer")
        return partial(
            recipes.train_t5, TextEncoders(PRESET.text, t5=t5_tower(PRESET.text.t5), t5_tokenizer=tokenizer).to(self.device)
        )

    def _mmdit_trainer(self) -> Callable[..., Iterator[Progress]]:
        data = [self.data(name) for name in DATA if name.startswith("latents")]
        return partial(recipes.train_mmdit, MMDiT(PRESET.mmdit).to(self.device), self.text(), data)

    def _controlnet_trainer(self, kind: str) -> Callable[..., Iterator[Progress]]:
        net = ControlNet.from_base(self.mmdit(), controlnet_config(), kind)
        return partial(recipes.train_controlnet, net, self.mmdit(), self.text(), self.data("latents"), self.data(f"hints_{kind}"))

    def _detector_trainer(self) -> Callable[..., Iterator[Progress]]:
        def train(run: Path, *, batch: int = 32, lr: float = 3e-3, **options: Any) -> Iterator[Progress]:
            return fit(Detector(), partial(detector_loss, batch=batch), run, lr=lr, **options)

        return train

    def prepare(self, name: str, share: tuple[int, int] = (0, 1)) -> None:
        """Make one of DATA, or one process's share of it; what is there is kept. A fifth of all scenes is drawn at other sizes."""
        what, _, which = name.partition("_")
        make: Callable[[list[int]], dict[str, Tensor]]
        if what == "hints":
            n, make = min(self.scenes, 4000), partial(recipes.hint_latents, self.vae(), which)
        else:
            height, width = map(int, which.split("x")) if which else PRESET.size
            n = -(-self.scenes // 4 // len(SIDES)) if which else self.scenes
            make = partial(recipes.scene_latents, self.vae(), self.text(), (height, width))
        for _ in tqdm(recipes.prepare(self.folder / name, range(n), make, share=share), desc=name, unit="file"):
            pass

    def data(self, name: str) -> dict[str, Tensor]:
        """Prepared data of this name, made on the first call."""
        self.prepare(name)
        return recipes.prepared(self.folder / name)

    def has(self, part: str) -> bool:
        """Whether the folder has weights of this part; a run that was killed before its first checkpoint has none."""
        return (self.folder / part / "checkpoint.safetensors").is_file()

    def vae(self) -> VAE:
        if not self.has("vae"):
            return load_vae(SHIPPED / "sd3_tiny.safetensors", device=self.device, dtype=torch.float32).eval()
        return self._with(VAE(PRESET.vae), "vae").eval()

    def mmdit(self) -> MMDiT:
        if not self.has("mmdit"):
            return load_mmdit(SHIPPED / "sd3_tiny.safetensors", device=self.device, dtype=torch.float32)
        return self._with(MMDiT(PRESET.mmdit), "mmdit", "mmdit.")

    def text(self) -> TextEncoders:
        encoders = TextEncoders.load(SHIPPED / "text_encoders", PRESET.text, device=self.device, dtype=torch.float32)
        for name, tower in encoders.named_children():
            if self.has(name):
                self._with(tower, name, "tower." if name == "t5" else "text.")
        return encoders

    def _with(self, module: Any, part: str, inside: str = "") -> Any:
        """A module with what a part's run trained, where names begin with `inside`; the rest of it stays as it is."""
        trained = {name.removeprefix(inside): x for name, x in averaged(self.folder / part).items() if name.startswith(inside)}
        module.load_state_dict(module.state_dict() | trained)
        return module.to(self.device)

    def assemble(self) -> Path:
        """Write the model as `load` reads it, in fp16, and beside it what else was trained; returns its file."""
        model = self.folder / "model"
        save_released(model / "sd3_tiny.safetensors", self.mmdit(), self.vae(), dtype=torch.float16)
        self.text().save(model / "text_encoders", dtype=torch.float16)
        for kind in CONTROLNETS:
            if self.has(f"controlnet_{kind}"):
                net = self._with(ControlNet.from_base(self.mmdit(), controlnet_config(), kind), f"controlnet_{kind}", "net.")
                save_released(model / f"controlnet_{kind}.safetensors", net, dtype=torch.float16)
        for channels in (4, 8):
            if self.has(f"vae_{channels}"):
                vae = self._with(VAE(replace(PRESET.vae, latent_channels=channels)), f"vae_{channels}")
                save_released(model / f"vae_{channels}.safetensors", vae, dtype=torch.float16)
        for tower in ("l", "g"):
            if self.has(f"clip_{tower}"):
                image = self._with(ImageTower(getattr(PRESET.text, f"clip_{tower}").width), f"clip_{tower}", "image.")
                _write_half(model / "text_encoders" / f"image_{tower}.safetensors", image)
        if self.has("detector"):
            _write_half(model / "detector.safetensors", self._with(Detector(), "detector"))
        return model / "sd3_tiny.safetensors"


def controlnet_config() -> ControlNetConfig:
    assert PRESET.controlnet is not None
    return PRESET.controlnet


def _write_half(path: Path, module: nn.Module) -> None:
    write(path, {name: weight.half() for name, weight in module.state_dict().items()})
