"""The whole: prompts go in, pictures come out. Loads the parts, and joins text encoders, guidance, sampler and VAE.

`SD3.generate` is a few lines over `encode_prompt`, `noise`, `sample` and `decode`, which notebooks call one by one.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from minisd3.config import PRESETS, MMDiTConfig, Preset, SamplerName, SkipLayers, require
from minisd3.controlnet import Control, ControlNet, check_fit, controlled
from minisd3.flow import interpolate, sd3_schedule
from minisd3.guidance import classifier_free, inpaint, skip_layer
from minisd3.mmdit import MMDiT
from minisd3.sampling import SAMPLERS
from minisd3.text import Prompts, TextEncoders
from minisd3.types import Conditioning
from minisd3.vae import VAE
from minisd3.weights import load_controlnet, load_mmdit, load_vae

Prompt = str | Prompts
Size = int | tuple[int, int]  # the side of a square, or height and width, in pixels
Schedule = Callable[[int, float], Tensor]  # (steps, shift) -> steps + 1 times: flow.sd3_schedule or flow.uniform_schedule
Hint = Image.Image | Tensor  # a picture, or (1 3 H W) in [-1, 1] as controlnet.canny, blur and depth make it
T = TypeVar("T")


class State(NamedTuple):
    """Where drawing stands after a step."""

    t: float
    latent: Tensor  # (B C H/8 W/8): the picture at time t
    x0: Tensor  # (B C H/8 W/8): where it would end if it went on as in the last step; SD3.decode shows it


class Settings(NamedTuple):
    """How a picture is sampled, with every choice made."""

    steps: int
    cfg: float
    slg: SkipLayers | None
    sampler: SamplerName
    shift: float


# --- pictures ---------------------------------------------------------------------------------------------------------------------


def from_pil(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as (1 3 H W) in [-1, 1], resized if it is not of size (height, width)."""
    return 2 * _values(picture.convert("RGB"), size) - 1


def _values(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """(1 C H W) in [0, 1]"""
    height, width = size
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    return values.reshape(1, height, width, -1).permute(0, 3, 1, 2)


def to_pil(image: Tensor, *, rounding: Literal["down", "nearest"] = "down") -> list[Image.Image]:
    """Pictures (B 3 H W), clamped to [-1, 1], with 8 bits a channel: rounded down as released (sd3_infer.py: vae_decode) or as in diffusers."""
    values = (image.detach().float().clamp(-1, 1) + 1) / 2 * 255
    values = values.round() if rounding == "nearest" else values
    return [Image.fromarray(one) for one in values.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]  # (H W 3) each


# --- the model --------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class SD3:
    """A model with all its parts, as `load` makes it.

    On a GPU the text encoders are there only while they work, before sampling. With low_memory that goes for every part.
    """

    preset: Preset
    mmdit: MMDiT
    vae: VAE
    text: TextEncoders
    controlnets: Sequence[ControlNet] = ()
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    low_memory: bool = False
    last_state: State | None = field(default=None, init=False, repr=False)  # of the newest `generate`, whether it ended or not

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        negative: Prompt | Sequence[Prompt] = "",
        size: Size | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        cfg: float | None = None,
        slg: SkipLayers | bool | None = None,
        sampler: SamplerName | None = None,
        shift: float | None = None,
        image: Image.Image | None = None,
        strength: float = 0.8,
        mask: Image.Image | None = None,
        control: Hint | Sequence[Hint] | None = None,
        control_strength: float | Sequence[float] = 1.0,
        progress: bool = True,
        callback: Callable[[int, State], bool | None] | None = None,
        control_start: float = 0.0,
        control_end: float = 1.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        schedule: Schedule = sd3_schedule,
        tiled: bool = False,
    ) -> list[Image.Image]:
        """Draw a picture of each prompt. What is left at None comes from the preset.

        prompt: one or several; minisd3.text.Prompts has words for each encoder. negative: what to lead away from, for all or for each
        seed: the same seed gives the same picture, alone or in a batch. One for all, or one for each; several draw one prompt repeatedly
        size: height and width or the side of a square, in pixels, multiples of preset.multiple; by default the image's, cut down to such
        steps, sampler ("euler", "heun", "dpmpp_2m"), shift, schedule: the path from noise to picture; see flow and sampling
        cfg: how far to follow the prompt; 1 needs no second pass. cfg_interval: the times in [0, 1] at which it is followed so far
        slg: skip-layer guidance; True takes the preset's (and its slg_cfg), SkipLayers(...) your own
        image, strength: begin with this picture, and leave out the first 1 - strength of the steps
        mask: of the image; white is drawn anew, black stays as it is to the pixel
        control: the hint of each loaded ControlNet; control_strength: one for all or one for each; from control_start to control_end,
            fractions of the steps
        callback: called as callback(steps made, State) after each step; if it returns True, State.x0 is the picture
        tiled: decode in tiles, for large pictures in little memory; greys differ a little

        Each picture has its settings in `.info`. If drawing is interrupted, `last_state` has what was reached.
        """
        prompts, negatives, seeds = _one_for_each(prompt, negative, seed)
        height, width = self.size(size, image)
        chosen = self.settings(steps=steps, cfg=cfg, slg=slg, sampler=sampler, shift=shift, controlled=control is not None)
        require(image is not None or mask is None, "a mask needs the image that it is for: generate(..., image=picture, mask=mask)")
        require(
            0 < strength <= 1, f"strength is {strength}; it must be above 0, which keeps the image, and at most 1, which ignores it"
        )
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        times = schedule(chosen.steps, chosen.shift)
        self.last_state = None
        with _advice(self):
            cond, uncond = self.encode_prompt(prompts, negatives)
            x, start = self.noise(generators, (height, width)), 0
            known = redrawn = None
            if image is not None:
                known = self.encode_image(image, (height, width), generators)
                start = int(chosen.steps * (1 - strength))  # sd3_infer.py: do_sampling
                x = interpolate(known, x, times[start])
            if mask is not None:
                redrawn = _values(mask.convert("L"), (height, width))  # (1 1 H W)
            controls = () if control is None else self.controls(
                control, (height, width), strength=control_strength, start=control_start, end=control_end
            )  # fmt: skip
            states = self.sample(
                x, cond, uncond, **chosen._asdict(), cfg_interval=cfg_interval, schedule=schedule, start=start, known=known,
                mask=redrawn, control=controls,
            )  # fmt: skip
            pictures = self.decode(self._follow(states, x, times[start:], progress, callback), tiled=tiled)
        if image is not None and mask is not None:
            pictures = [_paste(picture, image, mask) for picture in pictures]
        for i, picture in enumerate(pictures):
            own = {"prompt": prompts[i], "negative": negatives[i], "seed": seeds[i], "height": height, "width": width}
            picture.info.update(own | chosen._asdict() | {"slg": asdict(chosen.slg) if chosen.slg else None})
        return pictures

    # --- the steps of generate

    def settings(
        self,
        *,
        steps: int | None = None,
        cfg: float | None = None,
        slg: SkipLayers | bool | None = None,
        sampler: SamplerName | None = None,
        shift: float | None = None,
        controlled: bool = False,
    ) -> Settings:
        """What is given, and the preset's choice for the rest.

        slg=True means the preset's cfg with it, too. (The released script means to, but reads cfg before it changes it, and so samples
        with the usual one: sd3_infer.py: main.)
        """
        preset, last = self.preset, self.mmdit.config.depth - 1
        own = (preset.steps, preset.cfg, preset.sampler)
        usual_steps, usual_cfg, usual_sampler = (controlled and preset.with_control) or own
        usual = Settings(usual_steps, usual_cfg, None, usual_sampler, preset.shift)
        if slg is True:
            require(preset.slg is not None, "this model's preset has no skip-layer guidance; pass slg=SkipLayers(layers, ...)")
            slg, usual = preset.slg, usual._replace(cfg=preset.slg_cfg or usual.cfg)
        given: dict[str, Any] = {"steps": steps, "cfg": cfg, "slg": slg or None, "sampler": sampler, "shift": shift}
        chosen = usual._replace(**{name: value for name, value in given.items() if value is not None})
        outside = [i for i in chosen.slg.layers if not 0 <= i <= last] if chosen.slg else []
        require(not outside, f"slg skips blocks {outside}; this model's are 0 to {last}")
        require(chosen.sampler in SAMPLERS, f"sampler is {chosen.sampler!r}; choose one of {', '.join(SAMPLERS)}")
        return chosen

    def size(self, size: Size | None = None, image: Image.Image | None = None) -> tuple[int, int]:
        """Height and width in pixels: as asked, or the image's cut down to what can be drawn, or the preset's. Raises if they cannot be drawn."""
        m, table = self.preset.multiple, self.mmdit.config.pos_embed_max_size
        if size is None:
            size = self.preset.size if image is None else (max(m, image.height // m * m), max(m, image.width // m * m))
        height, width = (size, size) if isinstance(size, int) else size
        fits = all(side > 0 and side % m == 0 for side in (height, width))
        require(fits, f"a picture of {height} x {width} pixels cannot be cut into patches; make height and width multiples of {m}")
        largest = m * table
        require(
            max(height, width) <= largest,
            f"a picture of {height} x {width} pixels is beyond this model's table of {table} x {table} positions; "
            f"pass size=(height, width) with sides of at most {largest}",
        )
        return height, width

    def encode_prompt(
        self, prompt: Prompt | Sequence[Prompt], negative: Prompt | Sequence[Prompt] = ""
    ) -> tuple[Conditioning, Conditioning]:
        """What the transformer sees of each prompt, and of each negative prompt. All in one batch, which pads them to one length."""
        prompts, negatives, _ = _one_for_each(prompt, negative, 0)
        texts = list(dict.fromkeys([*prompts, *negatives]))  # each once
        with torch.no_grad(), self._present(self.text, stay=False):
            context, pooled = self.text.encode(texts)

        def rows(which: list[Prompt]) -> Conditioning:
            index = [texts.index(text) for text in which]
            return Conditioning(context[index], pooled[index])

        return rows(prompts), rows(negatives)

    def noise(self, generators: Sequence[torch.Generator], size: Size | None = None) -> Tensor:
        """(B C H/8 W/8) to start from: one picture's from each generator, on the CPU and in fp32, so that every device gets the same."""
        height, width = self.size(size)
        cells = self.vae.config.latent_channels, height // self.vae.config.factor, width // self.vae.config.factor
        return torch.stack([torch.randn(cells, generator=g) for g in generators]).to(self.device)

    def encode_image(self, image: Image.Image, size: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
        """(B C H/8 W/8): latents of the image at that size, one sample with each generator, ready for the transformer."""
        with torch.no_grad(), self._present(self.vae):
            mean, logvar = (part.float() for part in self.vae.encode(self._for_vae(from_pil(image, size))))
        return self.vae.normalize(torch.cat([self.vae.sample(mean, logvar, g) for g in generators]))

    def controls(
        self,
        hints: Hint | Sequence[Hint],
        size: tuple[int, int],
        *,
        strength: float | Sequence[float] = 1.0,
        start: float = 0.0,
        end: float = 1.0,
    ) -> list[Control]:
        """Each loaded ControlNet with its hint, for `sample`. Hints that are pictures are brought to the size."""
        hints = [hints] if isinstance(hints, Image.Image | Tensor) else list(hints)
        nets = len(self.controlnets)
        require(
            len(hints) == nets,
            f"{len(hints)} hints for {nets} ControlNets; give one for each that load(..., controlnet=...) loaded",
        )
        strengths = [strength] * nets if isinstance(strength, int | float) else list(strength)
        require(len(strengths) == nets, f"{len(strengths)} control strengths for {nets} ControlNets; give one, or one for each")
        made = []
        with torch.no_grad(), self._present(self.vae):
            for net, hint, own in zip(self.controlnets, hints, strengths, strict=True):
                pixels = from_pil(hint, size) if isinstance(hint, Image.Image) else hint
                made.append(Control(net, net.encode_hint(self.vae, self._for_vae(pixels)).float(), own, start, end))
        return made

    def decode(self, latent: Tensor, *, tiled: bool = False) -> list[Image.Image]:
        """Pictures of latents (B C H/8 W/8) as the transformer knows them."""
        with torch.no_grad(), self._present(self.vae):
            latent = self._for_vae(self.vae.denormalize(latent))
            return to_pil(self.vae.decode_tiled(latent) if tiled else self.vae.decode_sliced(latent))

    def sample(
        self,
        x: Tensor,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        *,
        steps: int | None = None,
        cfg: float | None = None,
        slg: SkipLayers | bool | None = None,
        sampler: SamplerName | None = None,
        shift: float | None = None,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        schedule: Schedule = sd3_schedule,
        start: int = 0,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        control: Sequence[Control] = (),
    ) -> Generator[Tensor, None, None]:
        """The states (B C H/8 W/8) after each step, from x to the sample; settings as in `generate`.

        x is at time number `start` of the schedule: noise at 0, an image with noise later. Without uncond there is no cfg. With mask
        (B 1 H W) in [0, 1], in pixels, the latents `known` (B C H/8 W/8) are kept where it is 0. control: as `controls` makes it.
        """
        chosen = self.settings(steps=steps, cfg=cfg, slg=slg, sampler=sampler, shift=shift, controlled=bool(control))
        require(uncond is not None or cfg in (None, 1), f"cfg is {cfg}, which needs uncond; encode_prompt makes both")
        scale = 1.0 if uncond is None else chosen.cfg
        times = schedule(chosen.steps, chosen.shift)
        require(0 <= start < chosen.steps, f"start is {start}; the steps are 0 to {chosen.steps - 1}")
        cond, uncond = (Conditioning(*(part.to(self.device) for part in c)) for c in (cond, uncond or cond))
        model = controlled(self.mmdit, control, times) if control else self.mmdit
        if chosen.slg is None:
            velocity = classifier_free(model, cond, uncond, scale, interval=cfg_interval)
        else:
            velocity = skip_layer(model, cond, uncond, scale, chosen.slg, times, interval=cfg_interval)
        if mask is not None:
            assert known is not None
            cells = F.max_pool2d(mask, self.vae.config.factor).to(self.device)  # a cell is redrawn if any of its pixels is
            velocity = inpaint(velocity, known.to(self.device), cells)
        states = SAMPLERS[chosen.sampler](velocity, x.to(self.device), times[start:])
        return self._inference(states, self.mmdit, *(one.net for one in control))

    # --- inside

    @torch.no_grad()
    def _inference(self, states: Iterator[Tensor], *parts: nn.Module) -> Generator[Tensor, None, None]:
        """The states, made without gradients by these parts."""
        with self._present(*parts):
            yield from states

    def _for_vae(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.vae.decoder.conv_in.weight.dtype)

    def _follow(
        self,
        states: Generator[Tensor, None, None],
        x: Tensor,
        times: Tensor,
        progress: bool,
        callback: Callable[[int, State], bool | None] | None,
    ) -> Tensor:
        """Go from state to state, from x on; keep the newest in last_state. Returns the last one's x0."""
        with contextlib.closing(states), tqdm(total=len(times) - 1, disable=not progress) as bar:
            for step, (latent, t, t_next) in enumerate(zip(states, times, times[1:], strict=False), 1):
                x0 = latent + (latent - x) * (t_next / (t - t_next))
                self.last_state, x = State(float(t_next), latent, x0), latent
                bar.update()
                if callback is not None and callback(step, self.last_state):
                    break
        return x0

    @contextlib.contextmanager
    def _present(self, *parts: nn.Module, stay: bool = True) -> Iterator[None]:
        """Here the parts are on the device; afterwards back in main memory, if they are not to stay or memory is low."""
        modules = [module for part in parts for module in part.modules()]
        own = [(m, *pair) for m in modules for pair in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))]
        before = [(module, name, tensor, tensor.data) for module, name, tensor in own]
        for part in parts:
            part.to(self.device)
        try:
            yield
        finally:
            if self.low_memory or not stay:  # main memory still has them: what is on the device is dropped, not copied back
                for module, name, tensor, data in before:
                    tensor.data = data
                    setattr(module, name, tensor)


def _one_for_each(
    prompt: Prompt | Sequence[Prompt], negative: Prompt | Sequence[Prompt], seed: int | Sequence[int]
) -> tuple[list[Prompt], list[Prompt], list[int]]:
    """A prompt, a negative prompt and a seed for each picture."""
    prompts, negatives = ([text] if isinstance(text, str | Prompts) else list(text) for text in (prompt, negative))
    seeds = list(seed) if isinstance(seed, Iterable) else [int(seed)]
    n = max(len(prompts), len(seeds))

    def spread(what: str, values: list[T]) -> list[T]:
        require(len(values) in (1, n), f"{len(values)} {what} for {n} pictures; give one, or one for each")
        return values * n if len(values) == 1 else values

    return spread("prompts", prompts), spread("negative prompts", negatives), spread("seeds", seeds)


def _paste(picture: Image.Image, image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture where the mask is white, the image where it is black: there it is exactly as it was."""
    image, mask = (one.convert(mode).resize(picture.size, Image.Resampling.LANCZOS) for one, mode in ((image, "RGB"), (mask, "L")))
    return Image.composite(picture, image, mask)


@contextlib.contextmanager
def _advice(sd3: SD3) -> Iterator[None]:
    """Where drawing ends early, what can be done about it."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):
            error.add_note(
                "minisd3: for less memory use load(..., low_memory=True), generate(..., tiled=True), a smaller size, fewer pictures at "
                "a time, or dtype=torch.bfloat16"
            )
        raise
    except KeyboardInterrupt as stop:
        if sd3.last_state is not None:
            stop.add_note("minisd3: what was reached is kept; sd3.decode(sd3.last_state.x0) draws it")
        raise


# --- loading ----------------------------------------------------------------------------------------------------------------------

MODELS = Path(__file__).parent / "models"
HUB = {
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "sd3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
}
FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


def load(
    name_or_path: str | Path = "tiny",
    *,
    controlnet: str | Path | Sequence[str | Path] | None = None,
    text_encoders: str | Path | None = None,
    without: Collection[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    low_memory: bool = False,
) -> SD3:
    """A model that is ready to draw.

    name_or_path: "tiny", which comes with the package; a released single file (sd3.5_medium.safetensors); a folder in diffusers' layout,
        or the hub's id of one ("stabilityai/stable-diffusion-3.5-medium"), which is downloaded. The preset is the one with the same
        transformer; the large model and its turbo, alike in that, are told apart by "turbo" in the name
    controlnet: file, folder or hub id of one or several; "canny", "blur" and "depth" are those that come with "tiny"
    text_encoders: folder of clip_l, clip_g and t5xxl .safetensors; by default text_encoders/ beside the single file, or else its own folder
    without: encoders to do without: "clip_l", "clip_g", "t5"
    device: by default CUDA, Apple's MPS or the CPU, the first that there is
    dtype: by default bfloat16 on CUDA, float16 on MPS and on a CUDA device that cannot compute in bfloat16, float32 on the CPU
    low_memory: on a GPU, keep every part in main memory but the one at work

    Raises ValueError for files that do not fit, and OSError for what is not there, cannot be fetched, or is not open to you.
    """
    device = torch.device(device or best_device())
    dtype = dtype or best_dtype(device)
    path = _find(name_or_path)
    home = torch.device("cpu") if low_memory else device
    mmdit = load_mmdit(path, device=home, dtype=dtype)
    preset = find_preset(mmdit.config, Path(name_or_path).name)
    vae = load_vae(path, device=home, dtype=dtype)
    paths = [] if controlnet is None else [controlnet] if isinstance(controlnet, str | Path) else list(controlnet)
    nets = [load_controlnet(_find_controlnet(one), device=home, dtype=dtype) for one in paths]
    for net in nets:
        check_fit(net.config, mmdit.config)
    if text_encoders is None:
        beside = path.parent / "text_encoders"
        text_encoders = path if path.is_dir() else beside if beside.is_dir() else path.parent
    text = TextEncoders.load(text_encoders, preset.text, without=without, device="cpu", dtype=dtype)
    return SD3(replace(preset, vae=vae.config), mmdit, vae, text, nets, device, low_memory)


def best_device() -> torch.device:
    """CUDA, Apple's MPS or the CPU: the first that there is."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(found)


def best_dtype(device: torch.device) -> torch.dtype:
    """What the released models compute in without loss on a device of this type, as fast as it can."""
    if device.type == "cpu":
        return torch.float32
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if able else torch.float16


def find_preset(config: MMDiTConfig, name: str) -> Preset:
    """The preset of a transformer: one that is equal, else, for settings to begin with, one that reads the same text."""
    equal = [key for key, preset in PRESETS.items() if preset.mmdit == config]
    if equal:
        return PRESETS[min(equal, key=lambda key: ("turbo" in key) != ("turbo" in name.lower()))]
    dims = config.context_dim, config.pooled_dim
    alike = [preset for preset in PRESETS.values() if (preset.text.context_dim, preset.text.pooled_dim) == dims]
    require(
        bool(alike),
        f"this transformer reads text of context_dim {dims[0]} and pooled_dim {dims[1]}, as no preset's encoders make it; "
        "build SD3(preset, mmdit, vae, text) from its parts",
    )
    return replace(alike[0], mmdit=config)


def _find(name_or_path: str | Path) -> Path:
    """The single file, or the folder in diffusers' layout."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    shipped = MODELS / name / f"sd3_{name}.safetensors"
    if name in PRESETS and shipped.is_file():
        return shipped
    if path.exists():
        return path
    if name in HUB:
        raise FileNotFoundError(
            f"{name} does not come with this package; load its hub id {HUB[name]!r}, which downloads it, or the path of its .safetensors"
        )
    if _is_hub_id(name):
        folder = _download(name, ["model_index.json", *(f"{folder}/*" for folder in FOLDERS)])
        return _with(folder / "transformer", name).parent
    raise FileNotFoundError(
        f"there is no file, folder or preset {name!r}; give a path, an id of the hub (owner/name), or one of {', '.join(PRESETS)}"
    )


def _find_controlnet(name_or_path: str | Path) -> Path:
    """The file or folder of a ControlNet."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    shipped = MODELS / "tiny" / f"controlnet_{name}.safetensors"
    if shipped.is_file():
        return shipped
    if path.exists():
        return path
    if _is_hub_id(name):
        return _with(_download(name, ["config.json", "*.safetensors"]) / "config.json", name).parent
    raise FileNotFoundError(
        f"there is no ControlNet {name!r}; give a file, a folder, an id of the hub (owner/name), or, for the tiny model, one of canny, blur, depth"
    )


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.endswith(".safetensors")


def _with(part: Path, repository: str) -> Path:
    if not part.exists():
        raise FileNotFoundError(
            f"{repository} has no {part.name}, so it is not in diffusers' layout; download its .safetensors "
            f"from https://huggingface.co/{repository} and load that path"
        )
    return part


def _download(repository: str, wanted: list[str]) -> Path:
    """Fetch these files of the hub's repository, with a progress bar; what is there already is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    page = f"https://huggingface.co/{repository}"
    login = "log in with `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
    try:
        folder = Path(
            snapshot_download(repository, allow_patterns=wanted, ignore_patterns=["*.fp16*", "*.bin", "*.msgpack", "*.onnx*"])
        )
    except GatedRepoError:
        raise PermissionError(f"{repository} is open to those who accept its licence: do so on {page}, then {login}") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"the hub has no {repository}, or shows it only to some: check {page}; if you may see it, {login}"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"{repository} is not on this machine, and the hub cannot be reached ({reason}). With a connection, load it once (HF_HUB_OFFLINE "
            "must not be set) and it stays; or copy its folder here and load that path"
        ) from None
    return folder
