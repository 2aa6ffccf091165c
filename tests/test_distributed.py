"""Two processes against one, with the same batches: replicated or in shards, the same losses, weights and checkpoints."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.distributed.tensor import DTensor

from minisd3 import distributed, training
from minisd3.config import MMDiTConfig
from minisd3.mmdit import MMDiT
from minisd3.training import OnlyAdamW, Optimizer, fit, flow_loss
from minisd3.types import Conditioning

CONFIG = MMDiTConfig(
    depth=3, head_dim=8, pos_embed_max_size=4, context_dim=12, pooled_dim=6, qk_norm="rms", dual_attention_layers=(0,)
)
STEPS = 4
OPTIONS: dict[str, Any] = {"steps": STEPS, "lr": 0.01, "ema": 0.5, "optimizer": OnlyAdamW}
PARTS: dict[str, Any] = {"batch": 2, "accumulate": 2}
MUON: dict[str, Any] = {"optimizer": Optimizer}


def model() -> MMDiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mmdit = MMDiT(CONFIG)
        for p in mmdit.parameters():
            nn.init.normal_(p, std=0.2)
    return mmdit


def batch_loss(batch: int) -> Callable[[nn.Module, int, Generator], Tensor]:
    g = Generator().manual_seed(0)
    latents, context, pooled = (torch.randn(16, *shape, generator=g) for shape in ((16, 4, 4), (5, 12), (6,)))

    def loss(module: nn.Module, step: int, generator: Generator) -> Tensor:
        index = distributed.share(torch.randint(16, (batch,), generator=generator))
        return flow_loss(module, latents[index], Conditioning(context[index], pooled[index]), generator)

    return loss


def run(module: nn.Module, folder: Path, *, batch: int = 4, stop: int | None = None, **options: Any) -> None:
    """Train, and keep the losses in losses.json. At step `stop` one process, the last, gets a Ctrl-C."""
    losses = []
    for progress in fit(module, batch_loss(batch), folder, **OPTIONS | options):
        losses.append(progress.loss)
        if progress.step == stop and os.environ.get("RANK") in (None, "1"):
            os.kill(os.getpid(), signal.SIGINT)
    if distributed.is_first():
        (folder / "losses.json").write_text(json.dumps(losses))


def exact(patch: pytest.MonkeyPatch) -> None:
    """fp32 on every machine: rounded to bf16, gradients depend on how a batch is split."""
    patch.setattr(training, "autocast", lambda device: contextlib.nullcontext())


def checkpointing() -> MMDiT:
    mmdit = model()
    mmdit.checkpointing = True
    return mmdit


def worker(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, distributed.joined(torch.device("cpu")):
        exact(patch)
        run(distributed.replicate(model()), folder / "replicated")
        run(distributed.replicate(model()), folder / "replicated, Muon, in parts", **PARTS, **MUON)
        run(distributed.shard(checkpointing()), folder / "in shards, in parts", **PARTS)
        run(distributed.shard(model()), folder / "in shards, Muon", **MUON)
        run(distributed.shard(model()), folder / "two go on from one")
        run(distributed.shard(model()), folder / "one goes on from two", stop=2)
        sharded = distributed.shard(model())
        held = sum(p.to_local().numel() for p in sharded.parameters() if isinstance(p, DTensor))
    (folder / f"held.{os.environ['RANK']}").write_text(str(held))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of one process and of two; those of two have the names that `worker` gives them."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        exact(patch)
        make_runs(folder)
    return folder


def make_runs(folder: Path) -> None:
    run(model(), folder / "alone")
    run(model(), folder / "alone, in parts", **PARTS)
    run(model(), folder / "alone, Muon", **MUON)
    run(model(), folder / "alone, Muon, in parts", **PARTS, **MUON)
    run(model(), folder / "two go on from one", stop=2)
    script = folder / "worker.py"
    lines = [
        "import sys, pathlib",
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
        "import test_distributed",
        "test_distributed.worker(pathlib.Path(sys.argv[1]))",
    ]
    script.write_text("\n".join(lines))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(folder)]
    done = subprocess.run(
        torchrun, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    run(model(), folder / "one goes on from two")


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "losses.json").read_text())


def farthest(one: Path, other: Path, what: str) -> float:
    """The largest difference between two runs' weights (model.) or their averages (average.)."""
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a if name.startswith(what))


# Muon's Newton-Schulz steps are in bf16 and rounded differently where gradients are summed in another order, hence its tolerance
PAIRS = [
    ("replicated", "alone", 5e-6),
    ("in shards, in parts", "alone, in parts", 5e-6),
    ("two go on from one", "alone", 5e-6),
    ("one goes on from two", "alone", 5e-6),
    ("replicated, Muon, in parts", "alone, Muon, in parts", 3e-4),
    ("in shards, Muon", "alone, Muon", 3e-4),
]


@pytest.mark.parametrize(("two", "one", "tolerance"), PAIRS)
def test_two_processes_make_the_run_of_one(runs: Path, two: str, one: str, tolerance: float) -> None:
    found, expected = losses(runs / two), losses(runs / one)
    assert len(expected) == STEPS
    assert found == pytest.approx(expected[-len(found) :], rel=1e-5)
    assert farthest(runs / two, runs / one, "model.") < tolerance
    assert farthest(runs / two, runs / one, "average.") < tolerance


def test_the_tolerances_are_small_beside_what_a_run_changes(runs: Path) -> None:
    for name in ("alone", "alone, Muon"):
        end = load_file(runs / name / "checkpoint.safetensors")
        moved = [float((end[f"model.{name}"] - p.detach()).abs().max()) for name, p in model().named_parameters()]
        assert statistics.median(moved) > 8e-4


def test_shards_hold_half_of_the_weights_each(runs: Path) -> None:
    held = [int((runs / f"held.{rank}").read_text()) for rank in range(2)]
    whole = sum(p.numel() for p in model().parameters())
    assert sum(held) == whole
    assert max(held) < 0.51 * whole


def test_a_batch_must_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.share(torch.arange(3)).tolist() == [0, 1, 2]
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    with pytest.raises(ValueError, match="a batch of 3 cannot be shared by 2 processes; make it a multiple of 2"):
        distributed.share(torch.arange(3))
