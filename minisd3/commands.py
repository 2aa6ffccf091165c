"""What the command line does: one function for each command, given the options that __main__ has read."""

import contextlib
import json
import math
import re
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm.auto import tqdm

from minisd3 import finetune, flow, scenes, scores
from minisd3.config import PRESETS, Preset, SkipLayers, require
from minisd3.controlnet import HINTS
from minisd3.evaluate import Judgement, grid, tally, tally_by_number
from minisd3.family import DATA, STEPS, Family
from minisd3.formats import replacing
from minisd3.lora import apply_lora
from minisd3.mmdit import MMDiT
from minisd3.pipeline import HUB, SD3, best_device, from_pil, load
from minisd3.scenes import Scene
from minisd3.scores import Draw, Drawn, Guidance
from minisd3.weights import describe

# --- generate ---------------------------------------------------------------------------------------------------------------------


# the options that tell how a picture looks, kept in its file; of skip-layer guidance there is `slg`, as it was used
SETTINGS = (
    "prompt", "negative", "seed", "count", "height", "width", "steps", "cfg", "cfg_interval", "sampler", "shift", "schedule", "image",
    "strength", "mask", "lora", "controlnet", "control", "make_hint", "control_strength", "control_start", "control_end", "model",
    "text_encoders", "without", "dtype", "tiled",
)  # fmt: skip


def generate(args: Namespace) -> None:
    """Draw, and save with the settings in the file."""
    require(bool(args.prompt), 'there is no prompt; say what to draw: python -m minisd3 generate "a red house beside a tree"')
    require(args.count >= 1, f"--count is {args.count}; it must be at least 1")
    wanted = [(prompt, seed) for prompt in args.prompt for seed in range(args.seed, args.seed + args.count)]
    paths = _free_paths(args.out, args.prompt[0], 1 if args.grid else len(wanted), args.force)
    pictures: dict[str, Any] = {name: _read(getattr(args, name)) for name in ("image", "mask") if getattr(args, name)}
    sd3 = load(args.model, controlnet=args.controlnet, **_model_options(args))
    for file, strength in map(_lora, args.lora or ()):
        apply_lora(sd3.mmdit, file, strength)
    options = _options(args, sd3, pictures.get("image"))
    drawn = []
    for i, (prompt, seed) in enumerate(wanted):
        [picture] = sd3.generate(prompt, seed=seed, **options, **pictures)
        if not args.grid:
            _save(picture, paths[i], _about(args, picture))
        drawn.append(picture)
    if args.grid:
        about = _about(args, drawn[0]) | {"prompt": args.prompt, "count": args.count}
        _save(_grid(drawn, args.count), paths[0], about)


def _model_options(args: Namespace) -> dict[str, Any]:
    """What `load` is told, the model's name and ControlNets aside."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return {name: getattr(args, name) for name in ("text_encoders", "device", "low_memory")} | {
        "dtype": dtype,
        "without": args.without or (),
    }


def _options(args: Namespace, sd3: SD3, image: Image.Image | None) -> dict[str, Any]:
    """What `generate` is told, prompt, seed and pictures aside."""
    names = (
        "negative",
        "steps",
        "cfg",
        "sampler",
        "shift",
        "strength",
        "control_strength",
        "control_start",
        "control_end",
        "tiled",
    )
    height, width = sd3.size(None, image)
    size = sd3.size((args.height or height, args.width or width))
    return {name: getattr(args, name) for name in names} | {
        "size": size,
        "slg": _slg(args, sd3.preset),
        "cfg_interval": tuple(args.cfg_interval),
        "control": [_hint(file, size, args.make_hint) for file in args.control] if args.control else None,
        "schedule": {"sd3": flow.sd3_schedule, "uniform": flow.uniform_schedule}[args.schedule],
        "progress": not args.quiet,
    }


def _slg(args: Namespace, preset: Preset) -> SkipLayers | bool:
    """The preset's skip-layer guidance, or that with what is given in its place."""
    names = ("layers", "scale", "start", "end")
    given = {name: value for name in names if (value := getattr(args, f"slg_{name}")) is not None}
    if not given:
        return args.slg
    require(
        preset.slg is not None or "layers" in given,
        "this model's preset has no skip-layer guidance; say which blocks: --slg-layers 7,8,9",
    )
    return replace(preset.slg, **given) if preset.slg else SkipLayers(**given)


def _lora(words: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH."""
    file, _, strength = words.rpartition(":")
    try:
        return file, float(strength)
    except ValueError:  # a name with a colon in it, or without one
        return words, 1.0


def _read(file: str) -> Image.Image:
    with Image.open(file) as picture:
        return picture.copy()


def _hint(file: str, size: tuple[int, int], make: str | None) -> Tensor:
    """(1 3 H W): the hint in this file, or made out of its picture."""
    picture = from_pil(_read(file), size)
    return HINTS[make](picture) if make else picture


def _free_paths(out: Path | None, prompt: str, n: int, force: bool) -> list[Path]:
    """Where n pictures go, so that none is lost. Without --out, names made of the prompt that are not taken."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))[:60] or "picture"
    first = out or next(path for path in _numbered(Path("out") / f"{words}.png") if not path.exists())
    require(first.suffix.lower() == ".png", f"--out is {first}; it must end in .png, which can hold the settings")
    paths = [first] if n == 1 else [path for path, _ in zip(_numbered(first), range(n), strict=False)]
    taken = [str(path) for path in paths if path.exists() and not force]
    require(not taken, f"{', '.join(taken)} exists; choose another --out, or overwrite with --force")
    return paths


def _numbered(path: Path) -> Iterator[Path]:
    """a.png, a-2.png, a-3.png, ..."""
    yield path
    for i in count(2):
        yield path.with_stem(f"{path.stem}-{i}")


def _about(args: Namespace, picture: Image.Image) -> dict[str, Any]:
    """The settings that a picture is saved with."""
    return {
        **{name: getattr(args, name) for name in SETTINGS},
        "count": 1,
        **{str(name): value for name, value in picture.info.items()},
    }


def _save(picture: Image.Image, path: Path, about: dict[str, Any]) -> None:
    info = PngInfo()
    info.add_text("minisd3", json.dumps(about))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=info)
    print(path)


def settings_of(file: str) -> dict[str, Any]:
    """The settings that a picture was saved with, as values of the options."""
    with Image.open(file) as picture:
        text = picture.info.get("minisd3")
    require(text is not None, f"{file} holds no settings of minisd3; only a .png as `generate` saved it does")
    about = json.loads(str(text))
    prompt, slg = about["prompt"], about["slg"] or {}
    settings = {name: about[name] for name in SETTINGS if name in about} | {f"slg_{name}": value for name, value in slg.items()}
    return settings | {"prompt": prompt if isinstance(prompt, list) else [prompt]}


def _grid(pictures: list[Image.Image], columns: int) -> Image.Image:
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, len(pictures) // columns * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


# --- models, inspect --------------------------------------------------------------------------------------------------------------


def models(args: Namespace) -> None:
    """A row for each preset."""
    row = "{:18} {:>13} {:>8} {:>8}  {:8} {:>5} {:>4} {:>5}  {}"
    print(row.format("preset", "parameters", "size", "largest", "sampler", "steps", "cfg", "shift", "weights"))
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in MMDiT(preset.mmdit).parameters())
        size, largest = f"{preset.size[0]} px", f"{preset.multiple * preset.mmdit.pos_embed_max_size} px"
        home = HUB.get(name, "in this package")
        print(row.format(name, f"{parameters:,}", size, largest, preset.sampler, preset.steps, preset.cfg, preset.shift, home))


def inspect(args: Namespace) -> None:
    """What a checkpoint is, from its header."""
    print(describe(args.file))


# --- train ------------------------------------------------------------------------------------------------------------------------


OWN = (
    "preset", "init", "fresh", "text_encoders", "without", "lora", "size", "buckets", "accumulate", "checkpointing", "parallel", "save_every",
)  # what --data can be told  # fmt: skip


def train(args: Namespace) -> None:
    """Train parts of the tiny family, each from where its run stands, and make a model of what there is."""
    for name in ("steps", "batch", "lr", "minutes"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name} is {value}; it must be more than 0")
    ends = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    if args.data:
        finetune.train(args, ends)
        return
    without_data = [f"--{name.replace('_', '-')}" for name in OWN if getattr(args, name)]
    require(not without_data, f"{', '.join(without_data)} only makes sense with pictures of your own; name them with --data")
    require(not torch.distributed.is_torchelastic_launched(), "torchrun is for --data; the small family trains in one process")
    family = Family(args.folder, torch.device(args.device or best_device()), args.seed, args.scenes)
    stopped = None
    parts = [args.part] if args.part in STEPS else [part for part in STEPS if part.startswith(args.part or "")]  # "clip" is both
    rounds = [(part, steps) for part in parts for steps in ([args.steps] if args.steps else STEPS[part])]
    for part, steps in rounds:
        options = {name: getattr(args, name) for name in ("batch", "lr") if getattr(args, name)}
        trainer = family.trainer(part)
        batch = args.batch or signature(trainer).parameters["batch"].default
        watched = partial(finetune.watched, batch=batch, ends=ends, board=args.tensorboard)
        try:
            with contextlib.closing(watched(trainer(steps=steps, **options), args.folder / part, steps)) as run:
                for progress in run:
                    if part == "mmdit" and args.sample_every and progress.step % args.sample_every == 0:
                        _draw(family, progress.step)
        except KeyboardInterrupt as stop:
            stopped = stop
            break
    if family.has("mmdit"):
        print(family.assemble())
    if stopped:
        raise stopped


def _draw(family: Family, step: int) -> None:
    """What the transformer's run has reached at its last checkpoint: the first held-out prompts, with the same noise each time."""
    if not family.has("mmdit"):
        return
    text, vae, preset = family.text(), family.vae(), PRESETS["tiny"]
    cond, empty = text.encode([scene.caption() for scene in scenes.PROMPTS[:8]]), text.encode([""])
    shape = vae.config.latent_channels, *(side // vae.config.factor for side in preset.size)
    sheet = finetune.draw_samples(family.mmdit(), vae, preset, shape, cond, empty)
    finetune.save_sheet(sheet, family.folder / "mmdit" / "samples" / f"{step:06d}.png")


def prepare(args: Namespace) -> None:
    """Make the data that the transformer and the ControlNets learn from, or one process's share of it."""
    number, processes = args.share
    require(1 <= number <= processes, f"--share is {number} {processes}; write 1 4 for the first of four processes")
    family = Family(args.folder, torch.device(args.device or best_device()), scenes=args.scenes)
    for name in DATA:
        family.prepare(name, (number - 1, processes))


# --- evaluate ---------------------------------------------------------------------------------------------------------------------


SHOWN = 64  # pictures in the grid, at most


def evaluate(args: Namespace) -> None:
    """Measure a model on captions and scenes that it was not trained on; or, for a table, how guidance changes what it draws."""
    if args.out:
        _free_paths(args.out, "", 1, args.force)
    taken = args.json and args.json.exists() and not args.force
    require(not taken, f"{args.json} exists; choose another --json, or overwrite with --force")
    asked, prompts = _asked(args)
    sd3 = load(args.model, **_model_options(args))
    chosen = sd3.settings(steps=args.steps, cfg=args.cfg, slg=_slg(args, sd3.preset), sampler=args.sampler, shift=args.shift)
    settings = {**chosen._asdict(), "size": sd3.size(tuple(args.size) if args.size else None)}
    draw = partial(scores.draw, sd3, asked, prompts, args.seed)
    if args.cfg_table:
        _table(args, sd3, draw, prompts, settings, args.cfg_table, scores.cfg_choices(settings["cfg"]))
    elif args.slg_table:
        given = {name: getattr(args, f"slg_{name}") for name in ("layers", "scale", "start", "end")}
        choices = scores.slg_choices(settings["cfg"], sd3.mmdit.config.depth, **given)
        _table(args, sd3, draw, prompts, settings, args.slg_table, choices)
    else:
        _measure(args, sd3, draw, prompts, settings)


def _asked(args: Namespace) -> tuple[Sequence[Scene], list[str]]:
    """The scenes to draw, and how each is asked for."""
    if args.captions is None:
        require(1 <= args.prompts <= len(scenes.PROMPTS), f"--prompts is {args.prompts}; there are 1 to {len(scenes.PROMPTS)}")
        fixed = scenes.PROMPTS[: args.prompts]
        return fixed, [scene.caption() for scene in fixed]
    require(args.captions >= 1, f"--captions is {args.captions}; it must be at least 1")
    seeds = range(scenes.HELD_OUT, scenes.HELD_OUT + args.captions)
    return [scenes.scene(seed) for seed in seeds], scenes.captions(seeds)


def _measure(args: Namespace, sd3: SD3, draw: Draw, prompts: list[str], settings: dict[str, Any]) -> None:
    """Say all scores; after Ctrl-C those of what was drawn."""
    seeds = range(scenes.HELD_OUT, scenes.HELD_OUT + args.scenes)
    held_out = scenes.pictures(seeds, *settings["size"])
    parts, judged, said, stopped = list[Tensor](), list[Judgement](), dict[str, float](), False
    try:
        with tqdm(total=len(prompts), desc="captions") as bar:
            for pictures, some in draw(settings):
                parts, judged = [*parts, pictures], judged + some
                bar.set_postfix_str(f"right {tally(judged).right}", refresh=False)
                bar.update(len(some))
        said |= scores.of_pictures(torch.cat(parts), prompts)
        said |= scores.of_model(sd3, held_out, scenes.captions(seeds), args.seed)
    except KeyboardInterrupt:
        if not judged:
            raise
        stopped = True
    accuracy = {"all": tally(judged)} | {f"{n} object{'s' * (n > 1)}": one for n, one in tally_by_number(judged).items()}
    print(scores.accuracy_table(accuracy))
    print("".join(f"{name:36} {score:10.4f}\n" for name, score in said.items()), end="")
    if args.json:
        about = {"model": args.model, "without": args.without or [], "seed": args.seed, "settings": scores.plain(settings)}
        rates = {of: {name: rate.numbers() for name, rate in vars(one).items()} for of, one in accuracy.items()}
        _write_json(args.json, {**about, "captions": len(judged), "accuracy": rates, "scores": said})
        print(args.json)
    if args.out:
        grid(torch.cat(parts)[:SHOWN]).save(args.out)
        print(args.out)
    if stopped:
        raise KeyboardInterrupt(f"stopped after {len(judged)} of {len(prompts)} captions")


def _table(
    args: Namespace, sd3: SD3, draw: Draw, prompts: list[str], settings: dict[str, Any], path: Path, choices: list[Guidance]
) -> None:
    """Draw all captions with each guidance; each is kept once it is whole, and the same command goes on from there."""
    others = {name: value for name, value in settings.items() if name not in Guidance._fields}
    made = scores.plain({
        "transformer": scores.fingerprint(sd3.mmdit), "without": args.without or [], "seed": args.seed, "captions": prompts, **others,
    })  # fmt: skip
    kept, rows = scores.read_table(path) if path.exists() else (made, {})
    require(kept == made, f"{path} is of another model or of other settings; name another file for these")
    left = [choice for choice in choices if choice not in rows]
    try:
        with tqdm(total=len(left) * len(prompts), desc=f"{len(left)} of {len(choices)} guidances", unit="picture") as bar:
            for choice in left:
                parts, judged = list[Tensor](), list[Judgement]()
                for pictures, some in draw(settings | choice._asdict()):
                    parts, judged = [*parts, pictures], judged + some
                    bar.update(len(some))
                rows[choice] = Drawn(judged, scores.of_pictures(torch.cat(parts), prompts))
                scores.write_table(path, made, rows)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; the same command draws what {path} does not have yet") from None
    finally:
        if done := {choice: rows[choice] for choice in choices if choice in rows}:
            print(scores.table_markdown(done))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")
