"""Training: the loop resumes to the bit after any end, and each loss is its formula."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from minisd3 import flow, formats
from minisd3.config import MMDiTConfig
from minisd3.formats import WeightsError
from minisd3.mmdit import MMDiT
from minisd3.training import OnlyAdamW, Optimizer, averaged, fit, flow_loss, kl_divergence, step_generator, trapezoid
from minisd3.types import Conditioning


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))


def noisy_loss(module: nn.Module, step: int, generator: Generator) -> Tensor:
    x = torch.randn(4, 3, 6, 6, generator=generator)
    return (module(x) - x.flatten(1)[:, :5]).square().mean()


def train(run: Path, steps: int, stop: int | None = None) -> nn.Module:
    module = net()
    for progress in fit(module, noisy_loss, run, steps=steps, lr=1e-2, save_every=3):
        if progress.step == stop:
            break
    return module


def steps_in_log(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_stopped_run_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 12)
    train(tmp_path / "halves", 12, stop=5)
    halves = train(tmp_path / "halves", 12)
    assert equal(whole, halves)
    a, b = averaged(tmp_path / "whole"), averaged(tmp_path / "halves")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_training import fit, net, noisy_loss
for progress in fit(net(), noisy_loss, Path(sys.argv[1]), steps=12, lr=1e-2, save_every=3):
    print(progress.step, flush=True)
    time.sleep(0.05 if progress.step < 7 else 60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_bit(tmp_path: Path, number: signal.Signals) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent))
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "7":
            break
    os.kill(child.pid, number)
    if number == signal.SIGINT:  # noted, the loop ends after the step it is in: the sleep of 60 s is cut short by a second Ctrl-C
        time.sleep(0.2)
        os.kill(child.pid, number)
    child.wait(timeout=120)
    child.stdout.close()
    resumed = train(tmp_path / "run", 12)
    assert equal(resumed, train(tmp_path / "whole", 12))
    assert steps_in_log(tmp_path / "run") == list(range(1, 13))  # what was made twice is told once


def test_ctrl_c_ends_the_loop_after_the_step_and_saves(tmp_path: Path) -> None:
    steps = []
    for progress in fit(net(), noisy_loss, tmp_path, steps=100, lr=1e-2, save_every=50):
        steps.append(progress.step)
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
    assert steps == [1, 2, 3, 4]
    assert next(fit(net(), noisy_loss, tmp_path, steps=100, lr=1e-2)).step == 5


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    def bad(module: nn.Module, step: int, generator: Generator) -> Tensor:
        return noisy_loss(module, step, generator) * (math.inf if step == 4 else 1)

    with pytest.raises(FloatingPointError, match="step 5"):
        list(fit(net(), bad, tmp_path, steps=10, lr=1e-2, save_every=3))
    assert next(fit(net(), noisy_loss, tmp_path, steps=10, lr=1e-2)).step == 4


def test_an_error_inside_a_step_saves_nothing_of_it(tmp_path: Path) -> None:
    calls = []

    def failing(module: nn.Module, step: int, generator: Generator) -> Tensor:
        calls.append(step)
        if len(calls) == 10:  # the second part of step 5
            raise RuntimeError("no such picture")
        return noisy_loss(module, step, generator)

    with pytest.raises(RuntimeError, match="no such picture"):
        list(fit(net(), failing, tmp_path / "run", steps=8, lr=1e-2, save_every=3, accumulate=2))
    runs = [net(), net()]
    for module, run in zip(runs, ("run", "whole"), strict=True):
        list(fit(module, noisy_loss, tmp_path / run, steps=8, lr=1e-2, accumulate=2))
    assert equal(*runs)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, path = formats.save_file, tmp_path / "checkpoint.safetensors"
    kept = []

    def full_from_the_second_time_on(tensors: Any, file: Path, metadata: Any) -> None:
        if path.exists():
            kept.append(path.read_bytes())
            file.write_bytes(b"a part of it")
            raise formats.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, file, metadata)

    monkeypatch.setattr(formats, "save_file", full_from_the_second_time_on)
    with pytest.raises(OSError, match="the disk is full; .*checkpoint.safetensors is whole, of step 3: free some space") as caught:
        list(fit(net(), noisy_loss, tmp_path, steps=12, lr=1e-2, save_every=3))
    assert caught.value.errno == errno.ENOSPC
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.safetensors", "log.jsonl"}
    assert path.read_bytes() == kept[0]
    monkeypatch.undo()
    resumed = train(tmp_path, 12)
    assert equal(resumed, train(tmp_path / "whole", 12))


def test_two_parts_of_a_step_are_one_batch_twice_as_large(tmp_path: Path) -> None:
    def both(module: nn.Module, step: int, generator: Generator) -> Tensor:
        parts = [torch.randn(4, 3, 6, 6, generator=step_generator(0, step, part)) for part in range(2)]
        x = torch.cat(parts)
        return (module(x) - x.flatten(1)[:, :5]).square().mean()

    one, two = net(), net()
    losses = [[p.loss for p in fit(module, loss, tmp_path / str(n), steps=6, lr=1e-2, accumulate=n, optimizer=OnlyAdamW)]
              for module, loss, n in ((one, both, 1), (two, noisy_loss, 2))]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_what_is_frozen_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    module, before = net(), net()
    module[0].requires_grad_(False)
    list(fit(module, noisy_loss, tmp_path, steps=2, lr=1e-2))
    assert averaged(tmp_path).keys() == {"3.weight", "3.bias"}
    assert torch.equal(module[0].weight, before[0].weight)
    assert not torch.equal(module[3].weight, before[3].weight)
    with pytest.raises(
        WeightsError, match="is of a run that trained something else: 2 missing: 0.bias, 0.weight; choose another folder"
    ):
        next(fit(net(), noisy_loss, tmp_path, steps=4, lr=1e-2))


def test_the_moving_average_is_one(tmp_path: Path) -> None:
    states = []
    module = net()
    for _ in fit(module, noisy_loss, tmp_path, steps=4, lr=1e-2, ema=0.9):
        states.append(module[0].weight.detach().clone())
    expected = states[0]
    for state in states[1:]:
        expected = 0.9 * expected + 0.1 * state
    torch.testing.assert_close(averaged(tmp_path)["0.weight"], expected)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    mmdit = MMDiT(MMDiTConfig(depth=2, head_dim=8, pos_embed_max_size=8, context_dim=12, pooled_dim=6))
    hidden = {id(p) for p in Optimizer(mmdit, 1e-3).hidden}
    names = {n for n, p in mmdit.named_parameters() if id(p) in hidden}
    assert names == {n for n, p in mmdit.named_parameters() if n.endswith(".weight") and ("attn" in n or "mlp.fc" in n)}


def test_convolutions_learn_the_same_with_their_channels_last_in_memory() -> None:
    """Muon then works on the same matrices with their columns in another order."""
    learnt = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(5, 6, 2)).to(memory_format=memory_format)  # type: ignore[call-overload]
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = Optimizer(net, 0.01)
        for _ in range(3):
            net(torch.ones(1, 3, 8, 8)).square().sum().backward()
            optimizer.step(1.0)
        assert all((p != old).any() for p, old in zip(net.parameters(), before, strict=True))
        learnt.append(net[0].weight)
    torch.testing.assert_close(*learnt, atol=1e-4, rtol=0)


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [trapezoid(step, 1000) for step in range(1000)]
    assert factors[0] == 0.01
    assert factors[99:800] == [1.0] * 701
    assert factors[900] == pytest.approx(0.5)


def test_every_step_has_its_own_randomness() -> None:
    each = [(seed, step, part) for seed in range(3) for step in range(50) for part in range(3)]
    assert len({torch.rand(1, generator=step_generator(*one)).item() for one in each}) == 450
    assert step_generator(5, 7).initial_seed() == step_generator(5, 7, 0).initial_seed() == (5 * 0x9E3779B97F4A7C15 + 7) % 2**63


def test_flow_loss_is_its_formula() -> None:
    config = MMDiTConfig(depth=2, head_dim=8, pos_embed_max_size=8, context_dim=12, pooled_dim=6)
    x0, cond = torch.randn(3, 16, 4, 4), Conditioning(torch.randn(3, 5, 12), torch.randn(3, 6))
    loss = flow_loss(MMDiT(config), x0, cond, Generator().manual_seed(1))  # a fresh model predicts zero
    generator = Generator().manual_seed(1)
    flow.logit_normal(3, generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    torch.testing.assert_close(loss, (noise - x0).square().mean())


DRAWN: list[tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = [
    (flow.logit_normal, flow.logit_normal_density),
    (partial(flow.mode, scale=0.8), partial(flow.mode_density, scale=0.8)),
    (flow.cosmap, flow.cosmap_density),
]


@pytest.mark.parametrize("which", range(len(DRAWN)))
def test_drawing_times_and_weighting_uniform_ones_are_the_same_in_the_mean(which: int) -> None:
    def guess(x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return (3 * t.square()).view(-1, 1, 1, 1).expand_as(x)  # of a velocity that is pure noise: an error of 9 t^4 + 1

    times, density = DRAWN[which]
    x0, nothing = torch.zeros(50_000, 1, 2, 2), Conditioning(torch.zeros(()), torch.zeros(()))
    drawn = flow_loss(guess, x0, nothing, Generator().manual_seed(0), times=times)
    weighted = flow_loss(guess, x0, nothing, Generator().manual_seed(0), times=flow.uniform, weight=density)
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    expected = (density(t) * (9 * t**4 + 1)).mean()
    plain = (9 * t**4 + 1).mean()
    assert abs(expected - plain) > 0.1
    for loss in (drawn, weighted):
        assert loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_kl_divergence_matches_torch() -> None:
    mean, logvar = torch.randn(2, 3), torch.randn(2, 3)
    ours = kl_divergence(mean, logvar)
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(ours, theirs)
