"""The command line: what it draws and prints, what it keeps in files, and that mistakes end in one line."""

import json
import subprocess
import sys
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minisd3 import commands, family, recipes, scores, training
from minisd3.__main__ import main
from minisd3.config import PRESETS, SkipLayers
from minisd3.evaluate import CaptionAccuracy, Judgement
from minisd3.scenes import HELD_OUT, captions, pictures
from minisd3.scores import Drawn, Guidance

PROMPT = "a red house"


@pytest.fixture
def draw(random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """generate with the random model, small and quickly, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(random_model / "sd3_tiny.safetensors"), "--device", "cpu", "--quiet"]

    def run(*words: str) -> int:
        small = [] if "--from" in words else ["--height", "32", "--width", "32", "--steps", "2"]
        return main(["generate", *words, *model, *small])

    return run


def settings(path: str) -> dict[str, Any]:
    with Image.open(path) as picture:
        return json.loads(picture.info["minisd3"])


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


# --- generate ---------------------------------------------------------------------------------------------------------------------


def test_a_picture_gets_a_name_and_never_replaces_another(draw: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(PROMPT) == draw(PROMPT) == 0
    assert capsys.readouterr().out.split() == ["out/a-red-house.png", "out/a-red-house-2.png"]
    assert (pixels("out/a-red-house.png") == pixels("out/a-red-house-2.png")).all()

    assert draw(PROMPT, "--out", "mine.png") == 0
    before = Path("mine.png").read_bytes()
    assert draw("two boats", "--out", "mine.png") == 2
    assert "mine.png exists; choose another --out, or overwrite with --force" in capsys.readouterr().err
    assert Path("mine.png").read_bytes() == before
    assert draw("two boats", "--out", "mine.png", "-f") == 0
    assert settings("mine.png")["prompt"] == "two boats"


def test_settings_are_in_the_file_and_draw_it_again(draw: Any) -> None:
    options = ["--negative", "fog", "--seed", "4", "--cfg", "3", "--slg-layers", "1,2", "--slg-end", "0.9", "--schedule", "uniform"]
    assert draw(PROMPT, *options, "--out", "first.png") == 0
    kept = settings("first.png")
    assert (kept["prompt"], kept["negative"], kept["seed"], kept["height"], kept["steps"], kept["cfg"]) == (
        PROMPT,
        "fog",
        4,
        32,
        2,
        3.0,
    )
    assert kept["slg"] == {"layers": [1, 2], "scale": 1.5, "start": 0.01, "end": 0.9}
    assert kept["sampler"] == "dpmpp_2m"  # the preset's, written out

    assert draw("--from", "first.png", "--out", "again.png") == 0
    assert (pixels("first.png") == pixels("again.png")).all()
    assert draw("--from", "first.png", "--seed", "5", "--out", "other.png") == 0
    assert (pixels("first.png") != pixels("other.png")).any()
    assert settings("other.png") == kept | {"seed": 5}


def test_a_file_cannot_ask_for_more_than_settings(draw: Any) -> None:
    assert draw(PROMPT, "--out", "first.png") == 0
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text("minisd3", json.dumps(settings("first.png") | {"force": True, "out": "first.png", "command": "train"}))
    Image.new("RGB", (8, 8)).save("evil.png", pnginfo=about)
    before = Path("first.png").read_bytes()
    assert draw("--from", "evil.png") == 0
    assert Path("first.png").read_bytes() == before
    assert Path("out/a-red-house.png").exists()


def test_prompts_and_seeds_in_a_grid(draw: Any) -> None:
    assert draw(PROMPT, "a boat", "--count", "3", "--seed", "5", "--grid", "--out", "grid.png") == 0
    sheet = pixels("grid.png")
    assert sheet.shape == (64, 96, 3)
    assert draw("a boat", "--seed", "6", "--out", "one.png") == 0
    assert (sheet[32:, 32:64] == pixels("one.png")).all()  # second row, second column
    assert settings("grid.png")["prompt"] == [PROMPT, "a boat"]

    assert draw(PROMPT, "--count", "2", "--out", "many.png") == 0
    assert [settings(name)["seed"] for name in ("many.png", "many-2.png")] == [0, 1]


def test_from_a_picture_with_a_mask_and_a_hint(draw: Any, random_model: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save("photo.png")
    Image.fromarray(np.where(np.arange(32) < 16, 255, 0).astype(np.uint8)[None].repeat(32, 0)).save("mask.png")
    assert draw(PROMPT, "--image", "photo.png", "--mask", "mask.png", "--strength", "1", "--out", "inpainted.png") == 0
    assert (pixels("inpainted.png")[:, 16:] == values[:, 16:]).all()
    assert (pixels("inpainted.png")[:, :16] != values[:, :16]).any()

    control = ["--controlnet", str(random_model / "control.safetensors"), "--control", "photo.png"]
    assert draw(PROMPT, "--out", "plain.png") == draw(PROMPT, *control, "--out", "hinted.png") == 0
    assert draw(PROMPT, *control, "--make-hint", "canny", "--out", "edges.png") == 0
    drawn = [pixels(f"{name}.png") for name in ("plain", "hinted", "edges")]
    assert all((a != b).any() for a, b in ((drawn[0], drawn[1]), (drawn[1], drawn[2])))


# --- mistakes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "there is no prompt; say what to draw"),
        (["generate", "x", "--model", "sd3.5-medium"], "sd3.5-medium does not come with this package; load its hub id"),
        (["generate", "x", "--model", "missing.safetensors"], "no file, folder or preset 'missing.safetensors'"),
        (["generate", "x", "--out", "x.jpg"], "--out is x.jpg; it must end in .png"),
        (["generate", "x", "--count", "0"], "--count is 0; it must be at least 1"),
        (["generate", "x", "--image", "nothing.png"], "nothing.png"),
        (["generate", "--from", "plain.png"], "plain.png holds no settings of minisd3"),
        (["inspect", "missing.safetensors"], "missing.safetensors does not exist"),
        (["train", "t5", "--steps", "0"], "--steps is 0; it must be more than 0"),
        (["train", "t5", "--lr", "-1"], "--lr is -1.0; it must be more than 0"),
        (["train", "mmdit", "--lora", "4", "--parallel", "fsdp"], "--lora, --parallel only makes sense with pictures of your own"),
        (["evaluate", "--prompts", "33"], "--prompts is 33; there are 1 to 32"),
        (["evaluate", "--captions", "0"], "--captions is 0; it must be at least 1"),
        (["evaluate", "--json", "plain.png"], "plain.png exists; choose another --json, or overwrite with --force"),
    ],
)
def test_a_mistake_ends_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("plain.png")
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("minisd3: ")
    assert message in err
    with pytest.raises((ValueError, OSError)):
        main([*words, "--traceback"])


@pytest.mark.filterwarnings("always")
def test_warnings_are_lines_too(draw: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("a red house and " * 30) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("minisd3: ")
    assert "CLIP-L leaves out" in line


def test_ctrl_c_ends_quietly(draw: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.SD3, "generate", interrupted)
    assert draw(PROMPT) == 130
    assert capsys.readouterr().err == "minisd3: stopped\n"


# --- help, models, inspect --------------------------------------------------------------------------------------------------------


def test_help_shows_examples_and_needs_no_torch() -> None:
    words = "import sys; from minisd3.__main__ import main\ntry: main(['generate', '--help'])\nfinally: assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout
    for part in ('python -m minisd3 generate "a red house beside a tree"', "--slg", "--from out/a-robot.png", "--make-hint canny"):
        assert part in shown


@pytest.mark.parametrize("command", ["generate", "models", "inspect", "train", "evaluate"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert "--traceback" in capsys.readouterr().out


def test_models_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["preset", *PRESETS]
    counts = {line.split()[0]: line.split()[1] for line in lines}
    assert counts["sd3.5-medium"] == "2,243,171,520"
    assert counts["sd3.5-large"] == counts["sd3.5-large-turbo"] == "8,056,627,520"
    assert "in this package" in lines[1]
    assert "stabilityai/stable-diffusion-3.5-large-turbo" in lines[-1]


def test_inspect_says_what_a_file_is(random_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(random_model / "sd3_tiny.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "transformer" in said
    assert "VAE" in said
    assert "tiny" in said


# --- train, evaluate --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def packaged(random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The random model in the place of the one in the package."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(random_model)
    monkeypatch.setattr(family, "SHIPPED", tmp_path / "models" / "tiny")
    return tmp_path


def test_training_all_parts_makes_a_model_that_draws(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packaged / "run"
    words = ["train", "--folder", str(folder), "--steps", "1", "--batch", "4", "--scenes", "4"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    model = folder / "model" / "sd3_tiny.safetensors"
    assert out.split() == [str(model)]
    assert all(f"{part}: 100%" in err for part in family.STEPS)
    assert all((model.parent / f"controlnet_{kind}.safetensors").exists() for kind in ("canny", "blur", "depth"))
    assert "loss=" in err
    assert main(["generate", PROMPT, "--model", str(model), "--steps", "1", "--out", str(packaged / "x.png"), "--quiet"]) == 0
    assert main(words) == 0  # all is done already
    average = training.averaged(folder / "t5")
    kept = family.TextEncoders.load(folder / "model" / "text_encoders", PRESETS["tiny"].text, dtype=torch.float32).t5
    assert kept is not None
    assert (kept.shared.weight.half() == average["tower.shared.weight"].half()).all()


def test_a_part_is_trained_in_rounds(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "t5", "--batch", "4", "--folder", str(packaged / "run")]
    monkeypatch.setitem(family.STEPS, "t5", (1, 3))
    assert main(words) == 0
    err = capsys.readouterr().err
    assert "| 1/1 [" in err and "| 3/3 [" in err
    assert len((packaged / "run" / "t5" / "log.jsonl").read_text().splitlines()) == 3
    assert main([*words, "--steps", "4"]) == 0
    assert "| 1/1 [" not in capsys.readouterr().err, "only the steps that are asked for"


def test_data_is_prepared_in_shares(packaged: Path) -> None:
    words = ["prepare", "--folder", str(packaged / "run"), "--scenes", "1003"]
    assert main([*words, "--share", "2", "2"]) == 0
    made = sorted(path.relative_to(packaged / "run") for path in (packaged / "run").rglob("*.safetensors"))
    assert made == [Path("hints_blur/000001000.safetensors"), Path("hints_canny/000001000.safetensors"), Path("hints_depth/000001000.safetensors"),
                    Path("latents/000001000.safetensors")]  # fmt: skip
    assert main([*words, "--share", "3", "2"]) == 2


def test_a_run_killed_before_its_first_checkpoint_is_passed_over(packaged: Path) -> None:
    made = family.Family(packaged / "run", torch.device("cpu"))
    for part in ("vae", "mmdit", "clip_l", "t5", "detector"):
        (made.folder / part).mkdir(parents=True)
    weights, shipped = made.mmdit().state_dict(), family.load_mmdit(family.SHIPPED / "sd3_tiny.safetensors").state_dict()
    assert all((weights[name] == x.float()).all() for name, x in shipped.items())
    made.text(), made.vae()


def test_training_stops_when_its_minutes_are_over(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "t5", "--folder", str(packaged / "run"), "--batch", "4", "--steps", "3", "--minutes", "1e-9"]
    assert [main(words), main(words), main([*words, "--tensorboard"])] == [130, 130, 0]
    err = capsys.readouterr().err
    assert "stopped at step 2 of 3" in err and "examples=" in err
    assert list((packaged / "run" / "t5").glob("events.*"))


def test_training_goes_on_where_it_stopped(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "vae", "--folder", str(packaged / "run"), "--batch", "4"]
    real = recipes.train_vae

    def stopped(*args: Any, **named: Any) -> Any:
        for progress in real(*args, **named):
            yield progress
            return

    monkeypatch.setattr(recipes, "train_vae", stopped)
    assert main([*words, "--steps", "2"]) == 130
    assert "stopped at step 1 of 2; the same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr(recipes, "train_vae", real)
    assert main([*words, "--steps", "2"]) == 0
    log = [json.loads(line)["step"] for line in (packaged / "run" / "vae" / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2]


@pytest.fixture
def judge(random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """evaluate with the random model, quickly, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(random_model / "sd3_tiny.safetensors"), "--device", "cpu"]
    return lambda *words: main(["evaluate", *model, "--scenes", "2", "--steps", "1", *words])


def test_evaluate_prints_scores_and_keeps_them(judge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompts", "9", "--json", "scores.json", "--out", "grid.png"]
    assert judge(*words) == 0
    out, err = capsys.readouterr()
    head, *lines = out.splitlines()
    assert head.split() == ["right", "(95%", "interval)", "all", "1", "object"]
    assert [line.split()[0] for line in lines[:9]] == [field.name for field in fields(CaptionAccuracy)]
    assert lines[0].count(" of 9") == 2 and lines[3].split() == ["relation", "of", "0", "of", "0"]
    assert lines[9].startswith("CLIP score, clip_l") and "VAE: PSNR in dB" in out and "loss at t = 0.5" in out
    assert "Frechet" not in out  # of 9 pictures it says nothing
    assert "captions: 100%" in err and ", right " in err

    kept = json.loads(Path("scores.json").read_text())
    assert (kept["captions"], kept["seed"], kept["settings"]["steps"], kept["settings"]["size"]) == (9, 0, 1, [128, 128])
    assert kept["accuracy"]["all"]["kind"]["of"] == 9 and 0 <= kept["accuracy"]["all"]["kind"]["share"] <= 1
    assert kept["accuracy"]["1 object"]["relation"] == {"right": 0, "of": 0, "share": None, "interval": None}
    assert kept["scores"]["VAE: SSIM"] < 1
    with Image.open("grid.png") as grid:
        assert grid.size == (8 * 128, 2 * 128)

    assert judge(*words) == 2
    assert judge(*words, "--force") == 0
    assert json.loads(Path("scores.json").read_text()) == kept  # the same seed, the same scores


def test_evaluate_draws_as_it_is_told(judge: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--captions",
        "3",
        "--without",
        "t5",
        "--size",
        "96",
        "128",
        "--seed",
        "4",
        "--cfg",
        "1",
        "--sampler",
        "euler",
        "--slg",
    ]
    real, told = commands.SD3.generate, []

    def seen(sd3: Any, prompts: list[str], **named: Any) -> Any:
        told.append((sd3.text.t5, prompts, named))
        return real(sd3, prompts, **named)

    monkeypatch.setattr(commands.SD3, "generate", seen)
    assert judge(*words, "--out", "grid.png") == 0
    [(t5, prompts, named)] = told
    assert t5 is None and prompts == captions(range(HELD_OUT, HELD_OUT + 3))
    assert (list(named["seed"]), named["size"], named["cfg"], named["sampler"]) == ([4, 5, 6], (96, 128), 1.0, "euler")
    assert named["slg"] == PRESETS["tiny"].slg and named["steps"] == 1
    with Image.open("grid.png") as grid:
        assert grid.size == (8 * 128, 96)
    assert judge("--prompts", "1", "--size", "64", "64") == 2
    assert "height is 64; a scene's sides are multiples of 16 from 96 to 192" in capsys.readouterr().err


def test_many_pictures_have_a_frechet_distance() -> None:
    seeds = range(HELD_OUT, HELD_OUT + 97)
    found = scores.of_pictures(pictures(seeds), captions(seeds))
    assert found["CLIP score, clip_l"] > 0.9 and found["CLIP score, clip_g"] > 0.9
    assert found["Frechet distance of 97 pictures"] == found["the same of rendered scenes"] > 0


def stop_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when `generate` is called for this time."""
    real, calls = commands.SD3.generate, count(1)

    def generate(*args: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **named)

    monkeypatch.setattr(commands.SD3, "generate", generate)


def test_ctrl_c_gives_the_scores_so_far(judge: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scores, "BATCH", 1)
    stop_at(3, monkeypatch)
    assert judge("--prompts", "4", "--json", "scores.json", "--out", "grid.png") == 130
    out, err = capsys.readouterr()
    assert "background" in out and " of 2" in out and "CLIP" not in out
    assert err.endswith("minisd3: stopped after 2 of 4 captions\n")
    assert json.loads(Path("scores.json").read_text())["captions"] == 2
    assert Path("grid.png").exists()


def test_a_table_goes_on_where_it_stopped(judge: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--captions", "2", "--slg-table", "slg.jsonl", "--slg-layers", "1,2", "--slg-scale", "2", "--slg-start", "0"]
    whole = commands.SD3.generate
    stop_at(3, monkeypatch)
    assert judge(*words) == 130
    out, err = capsys.readouterr()
    assert [line.split("|")[3].strip() for line in out.splitlines()] == ["without layers", "---", "none", "1, 2"]
    assert "the same command draws what slg.jsonl does not have yet" in err
    _, rows = scores.read_table(Path("slg.jsonl"))
    assert [one.slg for one in rows] == [None, SkipLayers((1, 2), 2.0, 0.0, 0.2)]

    calls = []

    def noted(*args: Any, **named: Any) -> Any:
        calls.append((named["cfg"], named["cfg_interval"], named["slg"]))
        return whole(*args, **named)

    monkeypatch.setattr(commands.SD3, "generate", noted)
    assert judge(*words) == 0
    assert calls == [(4.0, (0.0, 1.0), SkipLayers((1, 2), 2.0, 0.0, 0.5))]  # the only one left
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert {len(line) for line in lines} == {5 + 9 + 2 + 2} and [line[4] for line in lines[2:]] == ["", "0 to 0.2", "0 to 0.5"]
    assert lines[2][14:16] == ["0", "0"] and all(cell.endswith("%") or cell == "of 0" for cell in lines[3][5:14])
    assert 0 < float(lines[2][-1]) < 1  # a CLIP score

    assert judge(*words, "--seed", "1") == 2
    assert "slg.jsonl is of another model or of other settings" in capsys.readouterr().err


def test_a_table_of_cfg_scales(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CFG_SCALES", (1.0, 4.0))
    assert judge("--captions", "1", "--cfg-table", "cfg.jsonl", "--cfg", "3") == 0
    _, rows = scores.read_table(Path("cfg.jsonl"))
    parts = [(scale, interval) for scale in (3.0, 10.0) for interval in scores.CFG_INTERVALS]
    assert [(one.cfg, one.cfg_interval) for one in rows] == [*((scale, (0.0, 1.0)) for scale in (3.0, 1.0, 4.0)), *parts]


def test_what_the_tables_compare() -> None:
    every = scores.slg_choices(4.0, 6)
    assert every[0].slg is None and len(every) == len(set(every)) == 1 + (6 + 5) * len(scores.SLG_SCALES) * len(scores.SLG_WINDOWS)
    assert PRESETS["tiny"].slg in [one.slg for one in every]
    one = SkipLayers((3,), 1.0, 0.0, 1.0)
    assert scores.slg_choices(5.0, 6, layers=(3,), scale=1.0, start=0.0, end=1.0) == [Guidance(5.0), Guidance(5.0, slg=one)]
    assert scores.cfg_choices(4.0)[0] == Guidance(4.0) and len(set(scores.cfg_choices(4.0))) == len(scores.cfg_choices(4.0))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    judged = [Judgement((True, False), (False, True), False, True, True), Judgement((True,), (True,), None, True, False)]
    rows = {
        Guidance(4.0): Drawn(judged, {"CLIP score, clip_l": 0.5}),
        Guidance(1.5, (0.2, 0.8), SkipLayers((1, 2), 0.75, 0.0, 0.5)): Drawn(judged[::-1], {}),
    }
    scores.write_table(tmp_path / "table.jsonl", {"seed": 0}, rows)
    assert scores.read_table(tmp_path / "table.jsonl") == ({"seed": 0}, rows)


def test_gained_and_lost_captions_are_counted() -> None:
    right, wrong = Judgement((True,), (True,), None, True, True), Judgement((False,), (True,), None, True, True)
    rows = {Guidance(4.0): Drawn([right, wrong, wrong], {"score": 0.5}), Guidance(2.0): Drawn([wrong, right, right], {"score": 0.25})}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in scores.table_markdown(rows).splitlines()]
    assert [line[-3:] for line in lines] == [["gained", "lost", "score"], ["---"] * 3, ["0", "0", "0.500"], ["2", "1", "0.250"]]
    assert lines[2].count("33.3%") and lines[3].count("66.7%") and lines[2].count("of 0") == 2  # relations
