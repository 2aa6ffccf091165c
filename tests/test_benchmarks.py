"""The benchmark program at its smallest: both sides compute the same, a table comes out, and a skip-layer step computes nothing twice."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.run")


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in diffusers
def test_a_quick_run_prints_every_line_of_the_table(run: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """It gets there only if the results of both sides agree, compiled too."""
    run.main(["--quick"])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, _, *body = rows
    assert head[:5] == ["model", "numbers", "what", "ours", "diffusers"] and {len(row) for row in rows} == {9}
    work = [pair.work for pair in run.PAIRS.values()]
    what = ["load", *(name for name, _ in work[0].values()), "load", *(name for name, _ in work[1].values())]
    assert [row[2] for row in body] == what and {row[1] for row in body} == {"fp32, compiled"}
    for row in body:
        assert re.fullmatch(r"[\d.]+ m?s", row[3]) and re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", row[5]), row


def test_a_skip_layer_step_computes_no_block_twice(run: ModuleType) -> None:
    said = run.cost_of_skip_layers()
    assert "CFG computes 48 blocks" in said and "ours computes 62 (1.292" in said and "diffusers 69 " in said


def test_work_that_differs_is_not_timed(run: ModuleType, tmp_path: Path) -> None:
    """Another block left out by one side is enough."""
    plan = run.PLANS["quick"]
    [mode], config = plan.modes, plan.models["MMDiT-X, 3 blocks"]
    run.write_random(tmp_path, config, mode)
    ours, theirs = run.OurTransformer(tmp_path, mode), run.TheirTransformer(tmp_path, mode)
    given = run.Noise.random(plan, config, mode)
    with torch.no_grad():
        run.assert_same(ours.slg(given), theirs.slg(given), "the same")
        with pytest.raises(AssertionError, match="another: ours is .* away from theirs"):
            run.assert_same(ours.slg(given._replace(skip=(0,))).bfloat16(), theirs.slg(given).bfloat16(), "another")


def test_ratios_are_of_neighbouring_rounds(run: ModuleType) -> None:
    """A machine that slows down between rounds changes medians, and no ratio."""
    pace = [1.0, 5.0, 2.0, 9.0, 3.0]
    ours, theirs = iter(pace), iter([2 * seconds for seconds in pace])
    plan = run.replace(run.PLANS["quick"], rounds=5)
    assert run.in_turns(lambda: next(ours), lambda: next(theirs), plan) == (3.0, 6.0, 0.5, 0.5, 0.5)


def test_what_is_measured_cannot_be_kept_when_quick(run: ModuleType) -> None:
    with pytest.raises(SystemExit):
        run.main(["--quick", "--write"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # in torch.compile
def test_every_setting_of_training_makes_the_same_step(run: ModuleType) -> None:
    """A small network in the place of the real ones; in bf16 it is nearly the same."""
    settings = importlib.import_module("benchmarks.training").settings
    made: list[torch.nn.Conv2d] = []
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def network() -> tuple[torch.nn.Module, object]:
        made.append(torch.nn.Conv2d(4, 4, 3))
        return made[-1], lambda model: model(image).float().square().mean()

    names = []
    for name, step in settings(network):
        names.append(name)
        before = made[-1].weight.detach().clone()
        step()
        assert (made[-1].weight != before).any(), name
    assert names == ["eager, fp32", "bf16", "compiled", "channels last"]
    eager, *others = (one.weight for one in made)
    for name, weight in zip(names[1:], others, strict=True):
        torch.testing.assert_close(weight, eager, atol=1e-3 if name == "bf16" else 1e-5, rtol=0, msg=name)
