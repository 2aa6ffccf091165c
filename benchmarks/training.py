"""A training step of the tiny family on this machine's CPU: eager as `train` does it, in bf16, compiled, and with channels last.

Every setting trains the same new model on the same batch, in turns; times are medians over the rounds, and a ratio is to eager's. What
`train` does should be within 1.2 of the best.
"""

import argparse
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter

import torch
from torch import Generator, Tensor, nn

from minisd3 import flow, scenes
from minisd3.config import PRESETS
from minisd3.mmdit import MMDiT
from minisd3.recipes import random_crops
from minisd3.training import Optimizer
from minisd3.vae import VAE

Step = Callable[[], None]
PRESET = PRESETS["tiny"]


def transformer(batch: int = 64) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A new one, and its loss on random latents and text."""
    c, text = PRESET.mmdit, PRESET.text.clip_length + PRESET.text.t5_length
    x0, noise = torch.randn(2, batch, c.in_channels, 16, 16)
    t, cond = torch.rand(batch), (torch.randn(batch, text, c.context_dim), torch.randn(batch, c.pooled_dim))
    x, v = flow.interpolate(x0, noise, t), flow.velocity(x0, noise)
    return MMDiT(c), lambda model: (model(x, t, *cond).float() - v).square().mean()


def vae(batch: int = 16) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A new one, and how far it is from returning crops of scenes."""
    image = random_crops(scenes.pictures(range(batch)), 64, Generator().manual_seed(0))
    return VAE(PRESET.vae), lambda model: (model.decode(model.encode(image)[0]).float() - image).abs().mean()


def settings(make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]) -> Iterator[tuple[str, Step]]:
    """Each way to make a step."""
    for name in ("eager, fp32", "bf16", "compiled", "channels last"):
        torch.manual_seed(0)
        model, loss = make()
        if name == "channels last":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub
        yield name, step(model, torch.compile(loss) if name == "compiled" else loss, bf16=name == "bf16")


def step(model: nn.Module, loss: Callable[[nn.Module], Tensor], *, bf16: bool) -> Step:
    learner = Optimizer(model, lr=1e-3)

    def make() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(model)
        value.backward()
        learner.step(1.0)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken (default: 5)")
    rounds = parser.parse_args().rounds
    print(f"threads: {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}\n")
    print("| what | setting | a step | ratio to eager |\n|---|---|---:|---:|")
    for what, make in (("transformer, batch of 64", transformer), ("VAE, batch of 16 crops", vae)):
        ways = dict(settings(make))
        for one in ways.values():
            one()  # compiles, and warms up
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, one in ways.items():
                begin = perf_counter()
                one()
                times[name].append(perf_counter() - begin)
        eager = median(times["eager, fp32"])
        for name, took in times.items():
            print(f"| {what} | {name} | {median(took):.2f} s | {median(took) / eager:.2f} |", flush=True)


if __name__ == "__main__":
    main()
