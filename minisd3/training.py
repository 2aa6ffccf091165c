"""Training: one loop for every part, resumable to the bit, and the losses of the released models' kind.

`fit` is a generator: it makes a step, yields how it went, and stops when its caller stops. All randomness of step n comes from a
generator seeded with (seed, n), so a run that was killed and resumed takes the very steps of one that was not. A checkpoint is one
safetensors file with weights, their moving average and the optimisers' state, replaced atomically.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Muon
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from minisd3 import flow
from minisd3.formats import write
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

    A convolution (O I k k) is seen by Muon as the matrix (O, I k k) that it is. Both take learning rates of AdamW's size.
    """

    def __init__(self, module: nn.Module, lr: float, *, weight_decay: float = 0.01) -> None:
        trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.hidden = [p for n, p in trained if p.ndim >= 2 and not any(part in n for part in NOT_HIDDEN)]
        ids = {id(p) for p in self.hidden}
        rest = [p for _, p in trained if id(p) not in ids]
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.hidden]  # share the parameters' storage
        self.lr = lr
        self.parts: list[torch.optim.Optimizer] = [AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)]
        if self.matrices:
            self.parts.append(Muon(self.matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))

    def step(self, factor: float) -> None:
        """One step at lr * factor, then no gradients."""
        for matrix, p in zip(self.matrices, self.hidden, strict=True):
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
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
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                owner, index, name = key.split(".")
                if int(owner) == which:
                    state.setdefault(int(index), {})[name] = value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


# what enters or leaves the network, or modulates it: embeddings, first and last layers, adaLN
NOT_HIDDEN = ("embed", "adaLN_modulation", "final_layer", "conv_in", "conv_out", "register", "shared", "relative_attention_bias", "head")


def trapezoid(step: int, steps: int, *, warmup: int = 100, cooldown: float = 0.2) -> float:
    """Learning-rate factor: up over `warmup` steps, flat, then straight down to 0 over the last share of the run."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1, cooldown * steps))


def step_generator(seed: int, step: int) -> Generator:
    """The randomness of one step: a function of (seed, step) alone, which is what makes resuming exact."""
    return Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)


def fit(
    module: nn.Module, loss: Loss, run: Path, *, steps: int, lr: float, seed: int = 0, ema: float = 0.99, save_every: int = 500
) -> Iterator[Progress]:
    """Train `module` until it has made `steps` steps, yielding after each; continues run/checkpoint.safetensors if there is one.

    Ctrl-C, closing the generator or reaching `steps` all save first; a kill loses at most `save_every` steps. `averaged(run)` reads
    the moving average back.
    """
    run.mkdir(parents=True, exist_ok=True)
    optimizer = Optimizer(module, lr)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=False)
    start = _resume(run, module, average, optimizer)
    step, began = start, time.monotonic()
    with _interrupts() as interrupted, (run / "log.jsonl").open("a") as log:
        try:
            while step < steps and not interrupted:
                value = loss(module, step, step_generator(seed, step))
                value.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step(trapezoid(step, steps))
                average.update_parameters(module)
                step += 1
                seconds = time.monotonic() - began
                progress = Progress(step, steps, value.item(), seconds, (steps - step) * seconds / (step - start))
                if not math.isfinite(progress.loss):
                    raise FloatingPointError(f"the loss became {progress.loss} at step {step}; lower lr {lr} and resume from {run}")
                log.write(json.dumps({"step": step, "loss": round(progress.loss, 6), "seconds": round(seconds, 3)}) + "\n")
                if step % save_every == 0 and step < steps:
                    _save(run, step, module, average, optimizer)
                    log.flush()
                yield progress
        finally:
            if step > start and math.isfinite(value.item()):
                _save(run, step, module, average, optimizer)


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


def _save(run: Path, step: int, module: nn.Module, average: AveragedModel, optimizer: Optimizer) -> None:
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.module.state_dict().items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer.tensors().items()}
    write(run / "checkpoint.safetensors", {k: v.detach().clone() for k, v in tensors.items()}, {"step": str(step)})


def _read(run: Path, prefix: str) -> tuple[dict[str, Tensor], int]:
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        tensors = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
        return tensors, int(file.metadata()["step"])


def _resume(run: Path, module: nn.Module, average: AveragedModel, optimizer: Optimizer) -> int:
    if not (run / "checkpoint.safetensors").exists():
        return 0
    weights, step = _read(run, "model.")
    module.load_state_dict(weights)
    average.module.load_state_dict(_read(run, "average.")[0])
    average.n_averaged.fill_(step)
    optimizer.load_tensors(_read(run, "optimizer.")[0])
    return step


def averaged(run: Path) -> dict[str, Tensor]:
    """The moving average of a run's weights, as a state dict of the module that was trained."""
    return _read(run, "average.")[0]


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    """bf16 where the processor is made for it (a GPU, or a CPU with AMX), else no change."""
    kind = torch.device(device).type
    able = torch.cuda.is_bf16_supported() if kind == "cuda" else "AMX" in torch.backends.cpu.get_cpu_capability()
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=able)


# --- losses ----------------------------------------------------------------------------------------------------------------------


def flow_loss(mmdit: Callable[..., Tensor], x0: Tensor, cond: Conditioning, generator: Generator) -> Tensor:
    """Mean squared error of the velocity at logit-normal times (Esser et al. 2024, eq. 14 and section 3.1)."""
    t = flow.logit_normal(len(x0), generator=generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    with autocast(x0.device):
        v = mmdit(flow.interpolate(x0, noise, t), t, *cond)
    return F.mse_loss(v.float(), flow.velocity(x0, noise))


def vae_loss(vae: VAE, image: Tensor, generator: Generator, *, kl_weight: float = 5e-4) -> Tensor:
    """How far the decoded sample is from image (B 3 H W), in values and in edges, plus a light pull of the latents to N(0, 1).

    Rombach et al. 2022 add a perceptual and an adversarial term, which need a network trained on photographs.
    """
    with autocast():
        mean, logvar = vae.encode(image)
        decoded = vae.decode(vae.sample(mean.float(), logvar.float(), generator))
    error = decoded.float() - image
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + kl_weight * kl_divergence(mean.float(), logvar.float())


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), averaged over all latent cells (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
