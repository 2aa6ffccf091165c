"""minisd3 against diffusers: the same weights, out of the same files, in the same run and in turns. Time, peak memory, and their ratios.

Both sides are asked for the same result, and before any clock runs it must be the same. Each round lets each side work once; times are
medians over the rounds, and a ratio is the median of the rounds' ratios, so that what slows the whole machine for a while slows both.
Loading, and peak memory with the weights included, are measured for each side in a process of its own.
"""

import argparse
import ctypes
import gc
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import product
from math import isnan, nan
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minisd3 import weights
from minisd3.config import PRESETS, MMDiTConfig, SkipLayers, VAEConfig
from minisd3.flow import sd3_schedule
from minisd3.guidance import classifier_free, skip_layer
from minisd3.mmdit import MMDiT
from minisd3.sampling import euler
from minisd3.types import Conditioning, Velocity
from minisd3.vae import VAE

README = Path(__file__).with_name("README.md")
PROCESS = Path("/proc/self")
STEPS, SHIFT, CFG, SLG_SCALE = 3, 3.0, 2.0, 1.0  # of the sampling that is timed; with SLG every step but the first has it
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # how far results may be apart, as a part of their size


class Mode(NamedTuple):
    """Where and how a model computes."""

    device: str
    dtype: torch.dtype
    backend: str | None = None  # of torch.compile, block by block

    def __str__(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype] + (", compiled" if self.backend else "")


@dataclass(frozen=True)
class Plan:
    """What is measured on one kind of device."""

    modes: tuple[Mode, ...]
    models: dict[str, MMDiTConfig | VAEConfig]
    picture: int  # side in pixels of the pictures that a transformer draws, at 8 pixels a latent cell
    text: int  # tokens
    skip: tuple[int, ...]  # blocks that skip-layer guidance leaves out
    vae_picture: int  # side in pixels of the pictures that a VAE encodes and decodes
    seconds: float  # of timing for each line of the table, at least
    rounds: int  # ... and at least so many of these


PLAIN, DUAL = MMDiTConfig(depth=8), MMDiTConfig(depth=8, qk_norm="rms", dual_attention_layers=(0, 1, 2, 3))
SMALL: dict[str, Any] = {"depth": 3, "head_dim": 8, "pos_embed_max_size": 8, "context_dim": 24, "pooled_dim": 16}
PLANS = {
    "cpu": Plan(
        (Mode("cpu", torch.float32), Mode("cpu", torch.bfloat16)),
        {"SD3, 8 blocks, 512 wide": PLAIN, "MMDiT-X, 8 blocks (4 dual), 512 wide": DUAL, "VAE": VAEConfig()},
        picture=256, text=64, skip=(3,), vae_picture=128, seconds=5, rounds=3,
    ),
    "cuda": Plan(
        (Mode("cuda", torch.bfloat16), Mode("cuda", torch.bfloat16, "inductor")),
        {"sd3.5-medium": PRESETS["sd3.5-medium"].mmdit, "sd3.5-large": PRESETS["sd3.5-large"].mmdit, "VAE": VAEConfig()},
        picture=1024, text=154, skip=(7, 8, 9), vae_picture=1024, seconds=15, rounds=5,
    ),
    "quick": Plan(
        (Mode("cpu", torch.float32, "eager"),),
        {
            "MMDiT-X, 3 blocks": replace(DUAL, dual_attention_layers=(0, 1), **SMALL), "VAE": VAEConfig(width=8, blocks=1, groups=4),
        },
        picture=64, text=5, skip=(1,), vae_picture=32, seconds=0, rounds=2,
    ),
}  # fmt: skip


# --- what both sides are given ----------------------------------------------------------------------------------------------------


class Noise(NamedTuple):
    """For a transformer: what one picture is drawn from, and the batch of two that guidance makes of it."""

    x: Tensor  # (1 C h w)
    cond: Conditioning
    uncond: Conditioning
    pair: Tensor  # (2 C h w)
    t: Tensor  # (2,)
    both: Conditioning
    skip: tuple[int, ...]

    @classmethod
    def random(cls, plan: Plan, config: MMDiTConfig, mode: Mode) -> "Noise":
        cells = plan.picture // 8
        x, context, pooled = normal(mode, (1, config.in_channels, cells, cells), (2, plan.text, config.context_dim), (2, config.pooled_dim))
        cond, uncond = (Conditioning(context[i : i + 1], pooled[i : i + 1]) for i in range(2))
        return cls(x, cond, uncond, torch.cat([x, x]), x.new_full((2,), 0.8, dtype=torch.float32), Conditioning(context, pooled), plan.skip)


class Picture(NamedTuple):
    """For a VAE."""

    image: Tensor  # (1 3 H W)
    latent: Tensor  # (1 C h w)

    @classmethod
    def random(cls, plan: Plan, config: VAEConfig, mode: Mode) -> "Picture":
        side, cells = plan.vae_picture, plan.vae_picture // config.factor
        return cls(*normal(mode, (1, 3, side, side), (1, config.latent_channels, cells, cells)))


def normal(mode: Mode, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(mode.device, mode.dtype) for shape in shapes]


# --- the two sides: each is made by side(folder, mode), and its other public methods are work to measure --------------------------


class OurTransformer:
    def __init__(self, folder: Path, mode: Mode) -> None:
        self.model = weights.load_mmdit(folder, device=mode.device, dtype=mode.dtype)
        self.parts = [*self.model.joint_blocks]

    def forward(self, given: Noise) -> Tensor:
        return self.model(given.pair, given.t, *given.both)

    def cfg(self, given: Noise) -> Tensor:
        return self._sample(given, classifier_free(self.model, given.cond, given.uncond, CFG))

    def slg(self, given: Noise) -> Tensor:
        slg = SkipLayers(given.skip, SLG_SCALE, start=0, end=1)
        return self._sample(given, skip_layer(self.model, given.cond, given.uncond, CFG, slg, sd3_schedule(STEPS, SHIFT)))

    def _sample(self, given: Noise, velocity: Velocity) -> Tensor:
        *_, sample = euler(velocity, given.x, sd3_schedule(STEPS, SHIFT))
        return sample


class TheirTransformer:
    def __init__(self, folder: Path, mode: Mode) -> None:
        from diffusers import SD3Transformer2DModel

        self.model = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=mode.dtype, device_map=mode.device)
        self.parts = [*self.model.transformer_blocks]

    def forward(self, given: Noise) -> Tensor:
        return self.model(given.pair, *given.both, 1000 * given.t, return_dict=False)[0]

    def cfg(self, given: Noise, **options: Any) -> Tensor:
        height, width = (8 * cells for cells in given.x.shape[2:])
        return self._pipeline(
            prompt_embeds=given.cond.context, pooled_prompt_embeds=given.cond.pooled, negative_prompt_embeds=given.uncond.context,
            negative_pooled_prompt_embeds=given.uncond.pooled, latents=given.x, height=height, width=width,
            num_inference_steps=STEPS, guidance_scale=CFG, output_type="latent", **options,
        ).images  # fmt: skip

    def slg(self, given: Noise) -> Tensor:
        window = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
        return self.cfg(given, skip_guidance_layers=list(given.skip), skip_layer_guidance_scale=SLG_SCALE, **window)

    @cached_property
    def _pipeline(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        pipeline = StableDiffusion3Pipeline(transformer=self.model, scheduler=scheduler, **dict.fromkeys(absent))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


class OurVAE:
    def __init__(self, folder: Path, mode: Mode) -> None:
        self.model = weights.load_vae(folder, device=mode.device, dtype=mode.dtype)
        self.parts = [self.model.encoder, self.model.decoder]

    def encode(self, given: Picture) -> Tensor:
        return self.model.encode(given.image)[0]

    def decode(self, given: Picture) -> Tensor:
        return self.model.decode(given.latent)


class TheirVAE:
    def __init__(self, folder: Path, mode: Mode) -> None:
        from diffusers import AutoencoderKL

        self.model = AutoencoderKL.from_pretrained(folder, torch_dtype=mode.dtype, device_map=mode.device)
        self.parts = [self.model.encoder, self.model.decoder]

    def encode(self, given: Picture) -> Tensor:
        return self.model.encode(given.image).latent_dist.mean

    def decode(self, given: Picture) -> Tensor:
        return self.model.decode(given.latent, return_dict=False)[0]


class Pair(NamedTuple):
    """Both sides of one kind of model, and what they are asked to do."""

    ours: Any
    theirs: Any
    given: Callable[[Plan, Any, Mode], Noise | Picture]
    work: dict[str, tuple[str, int]]  # method -> what the table calls it, by what its time is divided


PAIRS = {
    MMDiTConfig: Pair(
        OurTransformer, TheirTransformer, Noise.random,
        {"forward": ("forward, batch of 2", 1), "cfg": ("a step, CFG", STEPS), "slg": ("a step, CFG and SLG", STEPS)},
    ),
    VAEConfig: Pair(OurVAE, TheirVAE, Picture.random, {"encode": ("encode", 1), "decode": ("decode", 1)}),
}  # fmt: skip


def write_random(folder: Path, config: MMDiTConfig | VAEConfig, mode: Mode) -> None:
    """A model of random numbers, in the layout that both sides read. Matrices keep the spread of what goes through them."""
    with torch.device("meta"):
        model = (MMDiT(config) if isinstance(config, MMDiTConfig) else VAE(config)).to(mode.dtype)
    model.to_empty(device=mode.device)
    generator = torch.Generator(mode.device).manual_seed(0)
    for tensor in model.state_dict().values():
        mean, std = (0.0, tensor[0].numel() ** -0.5) if tensor.ndim > 1 else (1.0, 0.1)
        nn.init.normal_(tensor, mean, std, generator=generator)
    weights.save_diffusers(folder, model)


def tiny(side: Any, config: MMDiTConfig | VAEConfig, mode: Mode) -> Any:
    """The side with a random model that needs no file any more."""
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), config, mode)
        return prepared(side, Path(folder), mode)


def prepared(side: Any, folder: Path, mode: Mode) -> Any:
    """The loaded side, with nothing left to be read from the file later, and to be compiled where the mode says so."""
    loaded = side(folder, mode)
    for tensor in loaded.model.state_dict().values():
        tensor.flatten()[:: 4096 // tensor.element_size()].sum()  # one number of each page
    if mode.backend:
        torch.compiler.reset()
        for part in loaded.parts:
            part.compile(backend=mode.backend, fullgraph=True, dynamic=False)
    return loaded


# --- time -------------------------------------------------------------------------------------------------------------------------


class Time(NamedTuple):
    """Medians, in seconds, and of the ratios also the middle half."""

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], plan: Plan) -> Time:
    """Round after round each side is timed once, and the two take turns in who is first."""
    rounds: list[tuple[float, float]] = []
    start = perf_counter()
    while len(rounds) < plan.rounds or perf_counter() - start < plan.seconds:
        if len(rounds) % 2:
            b, a = theirs(), ours()
        else:
            a, b = ours(), theirs()
        rounds.append((a, b))
    low, middle, high = quantiles((a / b for a, b in rounds), n=4, method="inclusive")
    return Time(median(a for a, _ in rounds), median(b for _, b in rounds), middle, low, high)


def seconds(work: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def assert_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    if not error < TOLERANCE[theirs.dtype]:
        raise AssertionError(f"{what}: ours is {error:.2g} of its size away from theirs; times of different work tell nothing")


# --- loading and memory, alone in a process ---------------------------------------------------------------------------------------


def loading(side: Any, folder: Path, mode: Mode) -> float:
    return seconds(lambda: prepared(side, folder, mode), mode.device)


@torch.no_grad()
def peaks(side: Any, folder: Path, mode: Mode, plan: Plan, config: Any) -> list[float]:
    """Most bytes in use: of main memory while loading, then of the device's memory in each kind of work."""
    pair, device = PAIRS[type(config)], mode.device
    bring_in_libraries(side, type(config), mode)
    given = pair.given(plan, config, mode)
    before = resident("VmRSS")
    restart_peak("cpu")
    loaded = prepared(side, folder, mode)
    found = [peak("cpu") - before]
    for method in pair.work:
        if mode.backend:
            getattr(loaded, method)(given)  # compiles, which is not counted
        restart_peak(device)
        getattr(loaded, method)(given)
        found.append(peak(device) - (before if device == "cpu" else 0))
    return found


def bring_in_libraries(side: Any, kind: type, mode: Mode) -> None:
    """Do all the work once on a tiny model."""
    plan, pair = PLANS["quick"], PAIRS[kind]
    [config] = [config for config in plan.models.values() if type(config) is kind]
    loaded, given = tiny(side, config, mode._replace(backend=None)), pair.given(plan, config, mode)
    for method in pair.work:
        getattr(loaded, method)(given)
    del loaded
    gc.collect()


def return_what_is_free() -> None:
    """Have freed memory go back to the system at once, where the C library can be told to, so that the rest is what is in use."""
    if PROCESS.exists():
        ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD of mallopt(3): what is larger has pages of its own


def restart_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")  # proc(5): the peak begins anew at what is in use


def peak(device: str) -> float:
    """Most bytes in use since the restart: of tensors on a GPU, of the whole process on the CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(field: str) -> float:
    """Bytes of main memory in use now (VmRSS) or at most (VmHWM); not a number where the system does not tell."""
    if not PROCESS.exists():
        return nan
    [line] = [line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(field)]
    return 1024.0 * int(line.split()[1])


# --- the table --------------------------------------------------------------------------------------------------------------------

HEAD = """\
| model | numbers | what | ours | diffusers | ratio (middle half) | peak memory, ours | diffusers | ratio |
|---|---|---|---:|---:|---:|---:|---:|---:|"""


class Line(NamedTuple):
    model: str
    mode: Mode
    what: str
    time: Time
    memory: tuple[float, float]  # bytes

    def __str__(self) -> str:
        times = [f"{s:.3g} s" if s >= 1 else f"{1000 * s:.3g} ms" for s in self.time[:2]]
        sizes = ["-" if isnan(size) else f"{size / 1e6:,.0f} MB" for size in (*self.memory,)]
        ratio, share = "{2:.2f} ({3:.2f} to {4:.2f})".format(*self.time), self.memory[0] / self.memory[1]
        return f"| {' | '.join([self.model, str(self.mode), self.what, *times, ratio, *sizes, '-' if isnan(share) else f'{share:.2f}'])} |"


def lines(plan: Plan, mode: Mode, name: str, folder: Path, calls: Sequence[Callable[..., Any]]) -> Iterator[Line]:
    """All that is measured of one model; calls: one for each side, call(function, *args) runs it in that side's own process."""
    config = plan.models[name]
    pair = PAIRS[type(config)]
    both = pair.ours, pair.theirs
    write_random(folder, config, mode)
    memory = [call(peaks, side, folder, mode, plan, config) for call, side in zip(calls, both, strict=True)]
    first, *others = zip(*memory, strict=True)
    ours, theirs = (partial(call, loading, side, folder, mode) for call, side in zip(calls, both, strict=True))
    yield Line(name, mode, "load", in_turns(ours, theirs, plan), first)
    given = pair.given(plan, config, mode)
    loaded = [prepared(side, folder, mode) for side in both]
    for (method, (what, parts)), sizes in zip(pair.work.items(), others, strict=True):
        work = [partial(getattr(side, method), given) for side in loaded]
        assert_same(work[0](), work[1](), f"{name}, {mode}, {what}")
        ours, theirs = (partial(seconds, one, mode.device) for one in work)
        time = in_turns(ours, theirs, plan)
        yield Line(name, mode, what, time._replace(ours=time.ours / parts, theirs=time.theirs / parts), sizes)


@contextmanager
def process() -> Iterator[Callable[..., Any]]:
    """call(function, *args) -> what it returns, in a new process that stays until the end."""
    with ProcessPoolExecutor(1, get_context("spawn"), return_what_is_free) as pool:
        yield lambda *call: pool.submit(*call).result()


@torch.no_grad()
def measure(plan: Plan) -> Iterator[Line]:
    with process() as ours, process() as theirs:
        for mode, name in product(plan.modes, plan.models):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    yield from lines(plan, mode, name, Path(folder), (ours, theirs))
                except torch.OutOfMemoryError:
                    print(f"{name}, {mode}: left out, for it does not fit into the memory of the {mode.device} device", file=sys.stderr)


# --- what a skip-layer step costs, counted ----------------------------------------------------------------------------------------


@torch.no_grad()
def blocks_of_a_step(side: Any, config: MMDiTConfig, skip: tuple[int, ...]) -> tuple[float, float]:
    """How often a block is computed for one sample in a step with CFG, and in one with skip-layer guidance, too."""
    mode, plan = Mode("cpu", torch.float32), replace(PLANS["quick"], skip=skip)
    counted = 0

    def count(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal counted
        counted += len(next(value for value in (*args, *named.values()) if isinstance(value, Tensor)))

    loaded = tiny(side, config, mode)
    for part in loaded.parts:
        part.register_forward_pre_hook(count, with_kwargs=True)
    given = Noise.random(plan, config, mode)
    loaded.cfg(given)
    plain, counted = counted / STEPS, 0
    loaded.slg(given)
    return plain, (counted - plain) / (STEPS - 1)  # the first step has no skip-layer guidance


def cost_of_skip_layers() -> str:
    """A sentence about sd3.5-medium, counted on its 24 blocks made narrow."""
    medium = PRESETS["sd3.5-medium"]
    assert medium.slg is not None
    config = replace(medium.mmdit, **SMALL | {"depth": medium.mmdit.depth})
    (plain, ours), (_, theirs) = (blocks_of_a_step(side, config, medium.slg.layers) for side in (OurTransformer, TheirTransformer))
    return (
        f"Counted on sd3.5-medium: a step with CFG computes {plain:g} blocks of one sample; with skip-layer guidance, too, "
        f"ours computes {ours:g} ({ours / plain:.3f} times as many), diffusers {theirs:g} ({theirs / plain:.3f})."
    )


# --- the program ------------------------------------------------------------------------------------------------------------------


def machine(device: str) -> str:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, threads: {torch.get_num_threads()}"
    return f"{name}; " + ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "minisd3"))


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> None:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=devices, help="only this one of the devices here")
    parser.add_argument("--quick", action="store_true", help="tiny models and two rounds: whether all of it works, not how fast")
    parser.add_argument("--write", action="store_true", help=f"keep the tables in {README.parent.name}/{README.name}, below its introduction")
    options = parser.parse_args(argv)
    if options.quick and options.write:
        parser.error("--quick measures nothing worth keeping; use --write without it")
    text = ""
    for device in ["cpu"] if options.quick else [options.device] if options.device else devices:
        text += say(f"\n## {device.upper() if device == 'cpu' else 'GPU'}\n\n{machine(device)}\n\n{HEAD}")
        for line in measure(PLANS["quick" if options.quick else device]):
            text += say(str(line))
    text += say("\n" + cost_of_skip_layers())
    if options.write:
        introduction = README.read_text().partition("\n## ")[0].rstrip()
        README.write_text(f"{introduction}\n{text}")


def say(text: str) -> str:
    print(text, flush=True)
    return text + "\n"


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it says what it does without torchvision, which is not used
    main()
