"""A released model goes on learning, whole or by a LoRA, from pictures of your own: `python -m minisd3 train mmdit --data FOLDER`.

One process or, under torchrun, many. The order is that of memory: text encoders prepare the data and go before the transformer comes.
"""

import contextlib
import math
import time
from argparse import Namespace
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from minisd3 import data, distributed
from minisd3.config import MMDiTConfig, Preset, require
from minisd3.evaluate import grid
from minisd3.flow import sd3_schedule
from minisd3.formats import some
from minisd3.guidance import classifier_free
from minisd3.lora import add_lora, save_lora
from minisd3.mmdit import MMDiT
from minisd3.pipeline import MODELS, best_device, best_dtype, find_preset
from minisd3.sampling import SAMPLERS
from minisd3.text import TextEncoders
from minisd3.training import Progress, autocast, averaged, tensorboard
from minisd3.types import Conditioning
from minisd3.vae import VAE
from minisd3.weights import detect, load_mmdit, load_vae, save_released

SPREAD = {"ddp": distributed.replicate, "fsdp": distributed.shard}


def train(args: Namespace, ends: float) -> None:
    """Prepare the data, train from where the run stands until `ends`, and write what generate takes: a model, or a LoRA file."""
    _check(args)
    path, preset = source(args.init, args.preset)
    options: dict[str, Any] = {"steps": args.steps or 1000, "batch": args.batch or 8, "accumulate": args.accumulate or 1}
    with distributed.joined(torch.device(args.device) if args.device else best_device()) as device:
        distributed.share(torch.empty(options["batch"]))  # raises now, rather than when all is prepared, if it cannot be shared
        prepared = data.Prepared(_prepare(args, path, preset, device))
        vae = load_vae(path, device=device, dtype=torch.float32)
        mmdit = SPREAD[args.parallel or "ddp"](_transformer(args, path, preset.mmdit, device))
        run = args.folder / ("lora" if args.lora else "mmdit")
        lr = args.lr or (1e-4 if args.lora else 1e-5)
        steps = data.train_on(
            prepared, mmdit, run, lr=lr, shift=preset.shift, seed=args.seed, save_every=args.save_every or 500, **options
        )
        total, batch = options["steps"], options["batch"] * options["accumulate"]
        with contextlib.closing(watched(steps, run, total, batch=batch, ends=ends, board=args.tensorboard)) as bar:
            del steps  # the bar has it, and ends it when it ends
            for progress in bar:
                if args.sample_every and progress.step % args.sample_every == 0:
                    latents, cond = prepared.first(4)
                    sheet = draw_samples(distributed.bare(mmdit), vae, preset, latents.shape[1:], cond, prepared.empty)
                    if distributed.is_first():
                        save_sheet(sheet, run / "samples" / f"{progress.step:06d}.png")
        if distributed.is_first():
            print(_result(args, preset.mmdit, vae, run))


def _check(args: Namespace) -> None:
    """Raise ValueError for what makes no sense, before anything is loaded."""
    require(args.part == "mmdit", "--data is for the transformer: python -m minisd3 train mmdit --data FOLDER")
    for name in ("lora", "accumulate", "save_every"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    require(not (args.fresh and args.lora), "--fresh has no use for --lora, which changes a trained model")


def source(init: Path | None, name: str | None) -> tuple[Path, Preset]:
    """The file that training begins with, and its preset. Raises ValueError if there is none, or it is another than named."""
    if init is None:
        require(name in (None, "tiny"), f"training {name} begins with its released file; name that: --init {name}.safetensors")
        init = MODELS / "tiny" / "sd3_tiny.safetensors"
    require(init.is_file(), f"there is no file {init}; --init takes a released .safetensors")
    found = [part for part in detect(init) if isinstance(part.config, MMDiTConfig)]
    require(bool(found), f"{init} holds no transformer of SD3; see `python -m minisd3 inspect {init}`")
    config, presets = found[0].config, found[0].presets
    require(
        name is None or name in presets, f"{init} holds a transformer of {some(presets) if presets else 'no preset'}, not of {name}"
    )
    assert isinstance(config, MMDiTConfig)
    return init, find_preset(config, name or init.name)


def _prepare(args: Namespace, path: Path, preset: Preset, device: torch.device) -> list[Path]:
    """The data's shards, those that are missing made first; of many processes each makes its share."""
    side = preset.size[0] if args.size is None else args.size
    largest = preset.multiple * preset.mmdit.pos_embed_max_size
    fits = side % preset.multiple == 0 and 0 < side <= largest
    require(fits, f"--size is {side}; it must be a multiple of {preset.multiple}, and at most {largest}")
    sizes = data.buckets(side, preset.multiple) if args.buckets else [(side, side)]
    sizes = [size for size in sizes if max(size) <= largest]
    made_with = f"{path.name} {args.without}"
    shards = data.plan(data.find_examples(args.data), args.folder / "prepared", sizes, made_with=made_with)
    missing = [shard for shard in distributed.share_list(shards) if not shard.path.exists()]
    if missing:
        beside = path.parent / "text_encoders"
        folder = args.text_encoders or (beside if beside.is_dir() else path.parent)
        config = replace(preset.text, t5_limit=preset.text.t5_length)
        text = TextEncoders.load(folder, config, without=args.without or (), device=device, dtype=best_dtype(device))
        vae = load_vae(path, device=device, dtype=torch.float32)
        quiet = not distributed.is_first()
        for _ in tqdm(data.prepare(missing, vae, text), desc="prepare", unit="shard", total=len(missing), disable=quiet):
            pass
    distributed.anywhere(False)  # until all are there
    return [shard.path for shard in shards]


def _transformer(args: Namespace, path: Path, config: MMDiTConfig, device: torch.device) -> MMDiT:
    """With the file's weights or new ones; frozen and with a LoRA if one is asked for, then in the type that it would draw in."""
    if args.fresh:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            mmdit = MMDiT(config).to(device)
    else:
        mmdit = load_mmdit(path, device=device, dtype=best_dtype(device) if args.lora else torch.float32)
    if args.lora:
        add_lora(mmdit, args.lora, generator=torch.Generator().manual_seed(args.seed))
    mmdit.checkpointing = args.checkpointing
    return mmdit


def _result(args: Namespace, config: MMDiTConfig, vae: VAE, run: Path) -> Path:
    """Write the run's moving average as `generate` takes it: --lora FILE, or --model FILE."""
    with torch.device("meta"):
        mmdit = MMDiT(config)
    if args.lora:
        add_lora(mmdit, args.lora)
    mmdit.load_state_dict(averaged(run), strict=not args.lora, assign=True)
    if args.lora:
        save_lora(path := args.folder / "lora.safetensors", mmdit)
    else:
        save_released(path := args.folder / "model.safetensors", mmdit, vae, dtype=torch.float16)
    return path


# --- watching ---------------------------------------------------------------------------------------------------------------------


def watched(
    steps: Iterator[Progress], run: Path, total: int, *, batch: int, ends: float = math.inf, board: bool = False
) -> Generator[Progress, None, None]:
    """The same steps, with a bar of loss, speed (of `batch` examples a step) and the time left; none begins after `ends` (time.monotonic).

    board: write the losses to the run's folder for TensorBoard, too. Raises KeyboardInterrupt if they end early.
    """
    if board and distributed.is_first():
        steps = tensorboard(steps, run)
    done = total  # if nothing is left to do
    with tqdm(total=total, desc=run.name, unit="step", disable=not distributed.is_first()) as bar:
        for progress in steps:
            if done == total:
                bar.initial = bar.n = bar.last_print_n = progress.step - 1
            done = progress.step
            speed = batch * (done - bar.initial) / progress.seconds
            bar.set_postfix({"loss": f"{progress.loss:.4f}", "examples": f"{speed:.3g}/s"}, refresh=False)
            bar.update(done - bar.n)
            yield progress
            if distributed.anywhere(time.monotonic() > ends):
                break
        bar.n = done
    if done < total:
        raise KeyboardInterrupt(f"stopped at step {done} of {total}; the same command goes on from there")


@torch.no_grad()
def draw_samples(
    mmdit: nn.Module, vae: VAE, preset: Preset, shape: tuple[int, ...], cond: Conditioning, empty: Conditioning
) -> Image.Image:
    """A picture for each row of cond, latents of shape (C h w), in one row. Its noise is always the same and is its own: drawing does not
    change what a run draws. empty: what an empty prompt gives, of one row."""
    device, n = next(vae.parameters()).device, len(cond.pooled)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(n)]).to(device)
    cond, uncond = (Conditioning(*(_rows(part, n).to(device) for part in one)) for one in (cond, empty))
    velocity = classifier_free(mmdit, cond, uncond, preset.cfg)
    with autocast(device):
        *_, latents = SAMPLERS[preset.sampler](velocity, noise, sd3_schedule(preset.steps, preset.shift))
    return grid(vae.decode_sliced(vae.denormalize(latents.float())), columns=n)


def _rows(x: Tensor, n: int) -> Tensor:
    return x.expand(n, *x.shape[1:])


def save_sheet(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
