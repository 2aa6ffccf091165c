"""The command line's words: python -m minisd3 generate | models | inspect | train | evaluate. What each does is in commands.py.

A mistake ends in one line and exit code 2. PyTorch is imported after the words are understood, so that help appears at once.
"""

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GENERATE = """\
examples:
  python -m minisd3 generate "a red house beside a tree"
  python -m minisd3 generate "a blue boat" "a yellow star at night" --count 4 --grid --out stars.png
  python -m minisd3 generate "a robot" --steps 30 --cfg 5 --slg             more steps, closer to the prompt, better structure
  python -m minisd3 generate "a snowy day" --image out/a-robot.png --strength 0.6
  python -m minisd3 generate "a cat" --image room.png --mask corner.png     white in the mask is drawn anew
  python -m minisd3 generate --from out/a-robot.png --seed 7                the same settings, another seed
  python -m minisd3 generate "a fox" --model sd3.5_medium.safetensors       text encoders in text_encoders/ beside it
  python -m minisd3 generate "a fox" --model stabilityai/stable-diffusion-3.5-medium --lora fox.safetensors:0.8
  python -m minisd3 generate "a fox" --model sd3.5_large.safetensors --controlnet sd3.5_large_controlnet_canny.safetensors \\
      --control photo.jpg --make-hint canny
"""
TRAIN = """\
examples:
  python -m minisd3 train                         everything, one part after the other; then a model in runs/tiny/model
  python -m minisd3 train vae --steps 500         one part
  python -m minisd3 train mmdit --data photos --init sd3.5_medium.safetensors --folder runs/photos --lora 16
  torchrun --nproc-per-node 8 -m minisd3 train mmdit --data photos --init sd3.5_medium.safetensors --folder runs/photos --batch 64
Ctrl-C saves and ends; the same command goes on from there, and so does one after a crash. runs/tiny/vae/log.jsonl has every step's loss.
"""
PREPARE = """\
examples:
  python -m minisd3 prepare                       what `train` would make when it needs it
  for i in 1 2 3 4; do python -m minisd3 prepare --scenes 100000 --share $i 4 & done; wait
"""
EVALUATE = """\
examples:
  python -m minisd3 evaluate --out grid.png       the shipped model: 32 held-out prompts, 64 held-out scenes
  python -m minisd3 evaluate --captions 500 --json scores.json
  python -m minisd3 evaluate --captions 500 --without t5
  python -m minisd3 evaluate --captions 500 --steps 4 --sampler euler --shift 3 --size 96 192
  python -m minisd3 evaluate --captions 128 --cfg-table cfg.jsonl                     how far should the prompt be followed, and when?
  python -m minisd3 evaluate --captions 100 --slg-table slg.jsonl --slg-scale 1.5     which blocks are best left out?
What each number means is said in minisd3.evaluate (CaptionAccuracy). Ctrl-C ends with those of what was drawn; tables go on later.
"""
INSPECT = """\
example:
  python -m minisd3 inspect sd3.5_medium.safetensors
"""
MODELS = """\
Load one of those that are not in this package by its id on the hub, after accepting its licence there and `hf auth login`, or by
the path of its .safetensors. Settings are those that `generate` takes where nothing else is asked for.
"""


def parser(settings: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """All commands with their options; `settings` are other defaults of `generate`."""
    top = argparse.ArgumentParser(
        "python -m minisd3", description="Stable Diffusion 3 and 3.5, and a small family that runs anywhere."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    parts: list[tuple[str, str, str, Any]] = [
        ("generate", "draw pictures of prompts", GENERATE, _add_generate),
        ("models", "list the models and their settings", MODELS, lambda one: None),
        (
            "inspect",
            "say what a checkpoint is",
            INSPECT,
            lambda one: one.add_argument("file", help=".safetensors, or a folder of them"),
        ),
        ("train", "train the small family, or a model on pictures of your own", TRAIN, _add_train),
        ("prepare", "make the data that training reads, by several processes at once", PREPARE, _add_prepare),
        ("evaluate", "measure a model of the small family", EVALUATE, _add_evaluate),
    ]
    for name, purpose, more, add in parts:
        one = commands.add_parser(
            name,
            help=purpose,
            description=purpose,
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add(one)
        one.add_argument("--traceback", action="store_true", help="show where an error comes from")
        if name == "generate":
            one.set_defaults(**(settings or {}))
    return top


def _add_model(one: argparse.ArgumentParser) -> None:
    """Which model, and where it computes."""
    model = one.add_argument_group("the model")
    model.add_argument(
        "--model", default="tiny", help="tiny, a released .safetensors, a diffusers folder or its hub id (default: tiny)"
    )
    model.add_argument("--text-encoders", metavar="FOLDER", help="of clip_l, clip_g and t5xxl (default: beside the model)")
    model.add_argument("--without", action="append", choices=("clip_l", "clip_g", "t5"), help="an encoder to do without")
    model.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    model.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="(default: bfloat16 on CUDA, float32 on the CPU)"
    )
    model.add_argument("--low-memory", action="store_true", help="on a GPU: only the part at work is there")


def _add_generate(one: argparse.ArgumentParser) -> None:
    one.add_argument("prompt", nargs="*", help="what to draw; each one in quotes")
    _add_model(one)
    picture = one.add_argument_group("the picture (defaults: the model's preset; see `models`)")
    picture.add_argument("--negative", default="", metavar="PROMPT", help="what to lead away from")
    picture.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture (default: 0)")
    picture.add_argument("--count", type=int, default=1, help="pictures of each prompt, with seed, seed + 1, ... (default: 1)")
    picture.add_argument("--height", type=int, help="in pixels, a multiple of 16")
    picture.add_argument("--width", type=int)
    _add_sampling(picture)
    picture.add_argument(
        "--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="times at which cfg acts"
    )
    picture.add_argument(
        "--schedule", choices=("sd3", "uniform"), default="sd3", help="the released grid of times, or the textbook's"
    )
    _add_skip_layers(one)
    start = one.add_argument_group("starting from a picture")
    start.add_argument("--image", metavar="FILE", help="begin with this picture")
    start.add_argument("--strength", type=float, default=0.8, help="how much of it may change, above 0 to 1 (default: 0.8)")
    start.add_argument("--mask", metavar="FILE", help="white is drawn anew, black is kept")
    one.add_argument(
        "--lora", action="append", metavar="FILE[:STRENGTH]", help="change the model by it; may be given several times"
    )
    control = one.add_argument_group("ControlNet")
    control.add_argument(
        "--controlnet", action="append", metavar="FILE", help="may be given several times, with a --control for each"
    )
    control.add_argument("--control", action="append", metavar="FILE", help="its hint: a picture of edges, blurred, or of depth")
    control.add_argument("--make-hint", choices=("canny", "blur"), help="make the hints out of the --control pictures")
    control.add_argument("--control-strength", type=float, default=1.0)
    control.add_argument("--control-start", type=float, default=0.0, help="fractions of the steps")
    control.add_argument("--control-end", type=float, default=1.0)
    output = one.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="FILE", help="a .png; several get -2, -3, ... (default: a free name in out/)")
    output.add_argument("--grid", action="store_true", help="all in one picture: a row for each prompt, a column for each seed")
    output.add_argument(
        "--from", dest="settings_of", metavar="FILE", help="settings of a picture made here; what is given comes first"
    )
    output.add_argument("-f", "--force", action="store_true", help="overwrite files that exist")
    output.add_argument("--tiled", action="store_true", help="decode in tiles: large pictures in less memory")
    output.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=int)
    group.add_argument("--cfg", type=float, help="how far to follow the prompt; 1 turns guidance off")
    group.add_argument("--sampler", choices=("euler", "heun", "dpmpp_2m"))
    group.add_argument("--shift", type=float, help="moves the steps' times towards noise; 1 leaves them")


def _add_skip_layers(one: argparse.ArgumentParser) -> None:
    skip = one.add_argument_group("skip-layer guidance")
    skip.add_argument("--slg", action="store_true", help="as the preset has it")
    skip.add_argument("--slg-layers", type=_numbers, metavar="7,8,9", help="blocks to leave out")
    skip.add_argument("--slg-scale", type=float)
    skip.add_argument("--slg-start", type=float, help="fractions of the steps")
    skip.add_argument("--slg-end", type=float)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _add_train(one: argparse.ArgumentParser) -> None:
    parts = ("vae", "vae_4", "vae_8", "clip", "t5", "mmdit", "controlnet", "detector")
    one.add_argument("part", nargs="?", choices=parts, help="what to train (default: all, in this order)")
    _add_family(one)
    one.add_argument("--steps", type=int, help="how many in all (default: the recipe's, family.STEPS; with --data 1000)")
    one.add_argument("--batch", type=int, help="examples a step")
    one.add_argument("--lr", type=float, help="learning rate")
    one.add_argument("--seed", type=int, default=0, help="of the first weights and of every step (default: 0)")
    one.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    one.add_argument(
        "--sample-every", type=int, default=500, metavar="N", help="of mmdit, draw after N steps; 0: never (default: 500)"
    )
    one.add_argument("--tensorboard", action="store_true", help="write the losses for TensorBoard, too")
    own = one.add_argument_group("training mmdit on pictures of your own")
    own.add_argument(
        "--data", type=Path, action="append", metavar="PATH", help="a folder of pictures and captions, or a tar; or several"
    )
    own.add_argument("--preset", help="which model to train (default: tiny, or that of --init)")
    own.add_argument("--init", type=Path, metavar="FILE", help="the released .safetensors that training begins with")
    own.add_argument("--fresh", action="store_true", help="of that file take the VAE only: begin with new weights")
    own.add_argument("--text-encoders", metavar="FOLDER", help="of clip_l, clip_g and t5xxl (default: beside --init)")
    own.add_argument("--without", action="append", choices=("clip_l", "clip_g", "t5"), help="an encoder to do without")
    own.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA of this rank in place of the weights")
    own.add_argument("--size", type=int, metavar="SIDE", help="to which pictures are resized and cropped (default: the preset's)")
    own.add_argument("--buckets", action="store_true", help="crop to other proportions of the same area, too")
    own.add_argument("--accumulate", type=int, metavar="N", help="batches a step (default: 1)")
    own.add_argument("--checkpointing", action="store_true", help="compute activations twice rather than keep them")
    own.add_argument("--parallel", choices=("ddp", "fsdp"), help="under torchrun: whole models (ddp, the default), or one in shards")
    own.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 500)")


def _add_prepare(one: argparse.ArgumentParser) -> None:
    _add_family(one)
    one.add_argument(
        "--share", type=int, nargs=2, default=(1, 1), metavar=("I", "N"), help="the Ith of N processes' share (default: all)"
    )


def _add_family(one: argparse.ArgumentParser) -> None:
    one.add_argument("--folder", type=Path, default=Path("runs/tiny"), help="of the runs, one for each part (default: runs/tiny)")
    one.add_argument("--scenes", type=int, default=19_000, help="scenes that mmdit is trained on, encoded once (default: 19000)")
    one.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")


def _add_evaluate(one: argparse.ArgumentParser) -> None:
    _add_model(one)
    asked = one.add_argument_group("what is asked for").add_mutually_exclusive_group()
    asked.add_argument("--prompts", type=int, default=32, metavar="N", help="how many of the 32 fixed prompts (default: all)")
    asked.add_argument("--captions", type=int, metavar="N", help="instead of them, captions of N held-out scenes")
    picture = one.add_argument_group("the pictures (defaults: the model's preset; see `models`)")
    picture.add_argument("--seed", type=int, default=0, help="of the first picture; the next have the next (default: 0)")
    picture.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="multiples of 16 from 96 to 192")
    _add_sampling(picture)
    _add_skip_layers(one)
    output = one.add_argument_group("output")
    output.add_argument(
        "--scenes", type=int, default=64, metavar="N", help="held-out scenes for the VAE and the loss (default: 64)"
    )
    table = output.add_mutually_exclusive_group()
    table.add_argument("--cfg-table", type=Path, metavar="FILE", help="instead: a table of CFG scales and intervals, kept in this .jsonl")
    table.add_argument("--slg-table", type=Path, metavar="FILE", help="instead: a table of skip-layer guidances, kept in this .jsonl")
    output.add_argument("--json", type=Path, metavar="FILE", help="where to save all numbers")
    output.add_argument("--out", type=Path, metavar="FILE", help="where to save the first 64 pictures as a grid, a .png")
    output.add_argument("-f", "--force", action="store_true", help="overwrite --out and --json")


def main(words: Sequence[str] | None = None) -> int:
    """Do what the words say (by default the command line's); returns the exit code."""
    args = parser().parse_args(words)
    try:
        from minisd3 import commands

        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"minisd3: {message}", file=sys.stderr)
            if getattr(args, "settings_of", None):
                args = parser(commands.settings_of(args.settings_of)).parse_args(words)
            getattr(commands, args.command)(args)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        notes = getattr(error, "__notes__", [])
        if args.traceback or (
            isinstance(error, RuntimeError) and not notes
        ):  # of those only too little memory is the user's to mend
            raise
        said = " ".join([str(error), *notes])
        print(f"minisd3: {' '.join(said.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"minisd3: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
