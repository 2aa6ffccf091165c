"""Training: one loop for every part, resumable to the bit, and the losses of the released models' kind.

`fit` is a generator: it makes a step, yields how it went, and stops when its caller stops. All randomness of step n comes from a
generator seeded with (seed, n), so a run that was killed and resumed takes the very steps of one that was not. A checkpoint is one
safetensors file with weights, their moving average and the optimisers' state, replaced atomically; any number of processes may go on
from it (distributed.py).
"""

import contextlib
import errno
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from safetensors import safe_open
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Muon

from minisd3 import distributed, flow
from minisd3.formats import WeightsError, compare, write
from minisd3.types import Conditioning
from minisd3.vae import VAE

Loss = Callable[[nn.Module, int, Generator], Tensor]  # loss(module, step, generator) -> scalar


@dataclass(frozen=True)
class Progress:
    """One step of a run, as `fit` yields it and the run's log.jsonl keeps it."""

    step: int  # steps made so far
    steps: int  # steps asked for
    loss: float
    seconds: float  # since this process began to train
    left: float  # seconds, at the speed so far


class Optimizer:
    """Muon for the weight matrices inside the network, AdamW for everything else (Jordan et al. 2024).

    A convolution (O I k k) is seen by Muon as the matrix (O, I k k) that it is, its columns in the order of memory. Both take learning
    rates of AdamW's size. Muon's Newton-Schulz steps need whole matrices; of one in shards, torch's matrix products gather what they
    need, one after another.
    """

    def __init__(self, module: nn.Module, lr: float, *, weight_decay: float = 0.01) -> None:
        trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.hidden = [p for n, p in trained if self.is_hidden(n, p)]
        ids = {id(p) for p in self.hidden}
        rest = [p for _, p in trained if id(p) not in ids]
        self.matrices = [nn.Parameter(_as_matrix(p.detach(), p)) for p in self.hidden]  # share the parameters' storage
        self.lr = lr
        self.parts: list[torch.optim.Optimizer] = [AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)]
        if self.matrices:
            self.parts.append(Muon(self.matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))

    def is_hidden(self, name: str, parameter: Tensor) -> bool:
        """Whether Muon takes this one."""
        return parameter.ndim >= 2 and not any(part in name for part in NOT_HIDDEN)

    def step(self, factor: float) -> None:
        """One step at lr * factor, then no gradients."""
        for matrix, p in zip(self.matrices, self.hidden, strict=True):
            matrix.grad = None if p.grad is None else _as_matrix(p.grad, p)
            p.grad = None
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * factor
            part.step()
            part.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the optimisers' state, by name."""
        return {
            f"{which}.{index}.{name}": torch.as_tensor(value)
            for which, part in enumerate(self.parts)
            for index, state in part.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for which, part in enumerate(self.parts):
            trained = part.param_groups[0]["params"]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                owner, index, name = key.split(".")
                if int(owner) == which:
                    own = trained[int(index)]
                    state.setdefault(int(index), {})[name] = distributed.like(value, own) if value.shape == own.shape else value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


def _as_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """x, a weight (O I k k) or its gradient, as a view (O, I k k); if the weight lies in memory with its channels last, as (O, k k I)."""
    return x.flatten(1) if weight.is_contiguous() else x.movedim(1, -1).flatten(1)


class OnlyAdamW(Optimizer):
    """AdamW for everything: to go on with what AdamW trained, and for LoRA, whose factors are no maps of their own."""

    def is_hidden(self, name: str, parameter: Tensor) -> bool:
        return False


# what enters or leaves the network, or modulates it: embeddings, first and last layers, adaLN
NOT_HIDDEN = (
    "embed", "adaLN_modulation", "final_layer", "conv_in",
    "conv_out", "register", "shared", "relative_attention_bias", "head",
)  # fmt: skip


def trapezoid(step: int, steps: int, *, warmup: int = 100, cooldown: float = 0.2) -> float:
    """Learning-rate factor: up over `warmup` steps, flat, then straight down to 0 over the last share of the run."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1, cooldown * steps))


def step_generator(seed: int, step: int, part: int = 0) -> Generator:
    """The randomness of one part of one step: a function of (seed, step, part) alone, which is what makes resuming exact."""
    return Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + part * 0xBF58476D1CE4E5B9 + step) % 2**63)


def fit(
    module: nn.Module,
    loss: Loss,
    run: Path,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    ema: float = 0.99,
    save_every: int = 500,
    accumulate: int = 1,
    cooldown: float = 0.2,
    optimizer: Callable[[nn.Module, float], Optimizer] = Optimizer,
) -> Iterator[Progress]:
    """Train `module` until it has made `steps` steps, yielding after each; continues run/checkpoint.safetensors if there is one.

    module: on any device; under torchrun as distributed.replicate or distributed.shard give it. What does not require gradients is
        neither trained nor saved
    accumulate: how many calls of `loss`, each with a generator of its own, make a step; its loss is their mean
    cooldown: over which last share of the steps the learning rate falls to 0

    Ctrl-C, closing the generator or reaching `steps` all save first; a kill, a full disk or any other error loses at most `save_every`
    steps. `averaged(run)` reads the moving average back. Raises FloatingPointError for a loss that is not finite.
    """
    run.mkdir(parents=True, exist_ok=True)
    state = _State(distributed.bare(module), optimizer, lr, ema)
    start = state.resume(run)
    step, began = start, time.monotonic()
    with _full_disk(run), _interrupts() as interrupted, _log(run, start) as log:
        with contextlib.suppress(GeneratorExit):  # the caller stopped, between two steps
            while step < steps and not distributed.anywhere(bool(interrupted)):
                value = _gradients(module, loss, step, seed, accumulate)
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                state.step(trapezoid(step, steps, cooldown=cooldown))
                step += 1
                seconds = time.monotonic() - began
                progress = Progress(step, steps, value, seconds, (steps - step) * seconds / (step - start))
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss became {value} at step {step}; lower lr {lr} and resume from {run}")
                log.write(json.dumps({"step": step, "loss": round(value, 6), "seconds": round(seconds, 3)}) + "\n")
                if step % save_every == 0 and step < steps:
                    state.save(run, step)
                yield progress
        if step > start:
            state.save(run, step)


def _gradients(module: nn.Module, loss: Loss, step: int, seed: int, accumulate: int) -> float:
    """Gradients of one step, in the module; returns the mean loss."""
    total = torch.zeros(())
    for part in range(accumulate):
        last = part == accumulate - 1
        with contextlib.nullcontext() if last else distributed.without_averaging(module):
            value = loss(module, step, step_generator(seed, step, part)) / accumulate
            value.backward()
        total = total + value.detach().cpu()
    return distributed.mean(total)


def tensorboard(steps: Iterator[Progress], folder: Path) -> Iterator[Progress]:
    """The same steps, their losses written on the way to a file that `tensorboard --logdir folder` shows."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("writing for TensorBoard needs a package more: pip install 'minisd3[tensorboard]'") from None
    with contextlib.closing(SummaryWriter(str(folder))) as writer:
        for progress in steps:
            writer.add_scalar("loss", progress.loss, progress.step)
            yield progress


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """While open, Ctrl-C only adds to the list it gives, so that no step is cut in half; a second Ctrl-C interrupts for real."""
    seen: list[int] = []

    def note(number: int, _frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: a notebook's callback, which closes the generator instead
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _full_disk(run: Path) -> Iterator[None]:
    """Says what a full disk leaves."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        path = run / "checkpoint.safetensors"
        left = f"{path} is whole, of step {_read(run, '-')[1]}" if path.exists() else "there is no checkpoint yet"
        raise OSError(errno.ENOSPC, f"the disk is full; {left}: free some space and give the same command again") from error


def _log(run: Path, start: int) -> TextIO:
    """The run's log, cut back to `start` steps: those after the last checkpoint are made again."""
    path = run / "log.jsonl" if distributed.is_first() else Path(os.devnull)
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        if kept != lines:
            beside = path.with_suffix(".new")
            beside.write_text("".join(kept))
            os.replace(beside, path)
    return path.open("a", buffering=1)


class _State:
    """All that a run changes and a checkpoint keeps: weights, their moving average, the optimisers' state."""

    def __init__(self, module: nn.Module, optimizer: Callable[[nn.Module, float], Optimizer], lr: float, ema: float) -> None:
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        whole = all(p.requires_grad for p in module.parameters())
        self.weights = {name: x for name, x in module.state_dict().items() if whole or name in trained}  # the module's own memory
        self.average = {name: x.clone() for name, x in self.weights.items()}
        self.optimizer, self.ema, self.steps = optimizer(module, lr), ema, 0

    def step(self, factor: float) -> None:
        self.optimizer.step(factor)
        for name, x in self.average.items():
            if x.is_floating_point():
                x.lerp_(self.weights[name], 1 - self.ema if self.steps else 1.0)
        self.steps += 1

    def save(self, run: Path, step: int) -> None:
        tensors = {f"model.{name}": x for name, x in self.weights.items()}
        tensors |= {f"average.{name}": x for name, x in self.average.items()}
        tensors |= {f"optimizer.{name}": x for name, x in self.optimizer.tensors().items()}
        whole = {name: copy for name, x in tensors.items() if (copy := distributed.to_first(x)) is not None}
        if distributed.is_first():
            write(run / "checkpoint.safetensors", whole, {"step": str(step)})
        distributed.anywhere(False)  # so that nobody looks for it earlier

    def resume(self, run: Path) -> int:
        """Takes over the run's checkpoint, if there is one; returns how many steps it has made."""
        path = run / "checkpoint.safetensors"
        if path.exists():
            _fill(self.weights, _read(run, "model.")[0], path)
            averages, self.steps = _read(run, "average.")
            _fill(self.average, averages, path)
            self.optimizer.load_tensors(_read(run, "optimizer.")[0])
        return self.steps


def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], path: Path) -> None:
    wanted, found = ({name: tuple(x.shape) for name, x in some.items()} for some in (tensors, values))
    if differs := compare(found, wanted):
        raise WeightsError(
            f"{path} is of a run that trained something else: {differs}; choose another folder, or move this one away"
        )
    for name, x in tensors.items():
        x.copy_(distributed.like(values[name], x))


def _read(run: Path, prefix: str) -> tuple[dict[str, Tensor], int]:
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        tensors = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
        return tensors, int(file.metadata()["step"])


def averaged(run: Path) -> dict[str, Tensor]:
    """The moving average of what a run trained, by the module's names; of a whole module, its state dict."""
    return _read(run, "average.")[0]


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    """bf16 where the processor is made for it (a GPU, or a CPU with AMX), else no change."""
    kind = torch.device(device).type
    able = torch.cuda.is_bf16_supported() if kind == "cuda" else "AMX" in torch.backends.cpu.get_cpu_capability()
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=able)


# --- losses ----------------------------------------------------------------------------------------------------------------------


def flow_loss(
    mmdit: Callable[..., Tensor],
    x0: Tensor,
    cond: Conditioning,
    generator: Generator,
    *,
    times: flow.Times = flow.logit_normal,
    weight: Callable[[Tensor], Tensor] = flow.uniform_density,
) -> Tensor:
    """Weighted mean squared error of the velocity (Esser et al. 2024, eq. 14 and section 3.1).

    x0 (B C H W) and cond: this process's share of the batch; generator: that of the whole batch, the same in every process
    times: how times are drawn; weight: of the error at times t (B,). Drawing with a density, or drawing uniformly and weighting with the
        density, is the same in the mean; the paper draws, since then no computation is spent on what hardly counts
    """
    n = len(x0) * distributed.processes()
    t = distributed.share(times(n, generator=generator)).to(x0.device)
    noise = distributed.share(torch.randn(n, *x0.shape[1:], generator=generator)).to(x0)
    with autocast(x0.device):
        v = mmdit(flow.interpolate(x0, noise, t), t, *cond)
    error = (v.float() - flow.velocity(x0, noise)).square()
    return (weight(t).view(-1, 1, 1, 1) * error).mean()


def vae_loss(vae: VAE, image: Tensor, generator: Generator, *, kl_weight: float = 5e-4) -> Tensor:
    """How far the decoded sample is from image (B 3 H W), in values and in edges, plus a light pull of the latents to N(0, 1).

    Rombach et al. 2022 add a perceptual and an adversarial term, which need a network trained on photographs.
    """
    with autocast(image.device):
        mean, logvar = vae.encode(image)
        decoded = vae.decode(vae.sample(mean.float(), logvar.float(), generator))
    error = decoded.float() - image
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + kl_weight * kl_divergence(mean.float(), logvar.float())


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), averaged over all latent cells (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
