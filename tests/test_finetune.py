"""Training on pictures of one's own by the command line, from pictures and a released file to a model and a LoRA that generate takes."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboardX.proto import event_pb2

from minisd3 import distributed, finetune, training, weights
from minisd3.__main__ import main
from minisd3.config import PRESETS
from minisd3.text import TextEncoders

SMALL = ["--steps", "2", "--batch", "2", "--size", "32", "--save-every", "1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (40 + 8 * i, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of {i} boats")
    return folder


@pytest.fixture
def words(photos: Path, random_model: Path, tmp_path: Path) -> list[str]:
    init = ["--init", str(random_model / "sd3_tiny.safetensors"), "--device", "cpu"]
    return ["train", "mmdit", "--data", str(photos), *init, "--folder", str(tmp_path / "run"), *SMALL]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of one step."""
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], steps=1))


def drawn(model: Path, out: Path, *more: str) -> np.ndarray:
    texts = ["--text-encoders", str(model.parent / "text_encoders")] if (model.parent / "text_encoders").is_dir() else []
    options = ["--steps", "2", "--height", "32", "--width", "32", "--device", "cpu", "--quiet", "--out", str(out), "-f"]
    assert main(["generate", "a boat", "--model", str(model), *texts, *options, *more]) == 0
    return np.asarray(Image.open(out))


@pytest.mark.usefixtures("quick")
def test_a_model_goes_on_learning(
    words: list[str], random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*words, "--preset", "tiny", "--sample-every", "1", "--buckets"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(run / "model.safetensors")]
    assert "mmdit: 100%" in err and "examples=" in err
    assert weights.detect(run / "model.safetensors")[0].presets == ("tiny",)
    before, after = (
        weights.load_mmdit(path, dtype=torch.float32) for path in (random_model / "sd3_tiny.safetensors", run / "model.safetensors")
    )
    moved = [float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-3
    for step in (1, 2):
        with Image.open(run / "mmdit" / "samples" / f"{step:06d}.png") as sheet:
            assert sheet.size[0] % 16 == sheet.size[1] % 16 == 0 and sheet.size[0] > sheet.size[1]
    assert [json.loads(line)["step"] for line in (run / "mmdit" / "log.jsonl").read_text().splitlines()] == [1, 2]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the data is prepared, so no text encoder is needed")

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoders, "load", never)
        assert main([*words, "--buckets"]) == 0  # all is done already
    (run / "text_encoders").symlink_to(random_model / "text_encoders")
    drawn(run / "model.safetensors", tmp_path / "x.png")


@pytest.mark.usefixtures("quick")
def test_drawing_samples_does_not_change_the_run(words: list[str], tmp_path: Path) -> None:
    ends = []
    for name, every in (("with", "1"), ("without", "0")):
        assert (
            main([*words, "--folder", str(tmp_path / name), "--sample-every", every, "--accumulate", "2", "--checkpointing"]) == 0
        )
        ends.append(load_file(tmp_path / name / "mmdit" / "checkpoint.safetensors"))
    assert not (tmp_path / "without" / "mmdit" / "samples").exists()
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.usefixtures("quick")
def test_the_small_family_draws_what_its_last_checkpoint_reached(tmp_path: Path) -> None:
    command = [
        "train",
        "mmdit",
        "--folder",
        str(tmp_path),
        "--batch",
        "2",
        "--scenes",
        "4",
        "--sample-every",
        "1",
        "--device",
        "cpu",
    ]
    assert main([*command, "--steps", "1"]) == main([*command, "--steps", "2"]) == 0
    sheets = list((tmp_path / "mmdit" / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["000002.png"]  # there was none before the first checkpoint, at the end
    with Image.open(sheets[0]) as sheet:
        assert sheet.size == (8 * 128, 128)


def test_a_lora_is_trained_and_drawn_with(
    words: list[str], random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--lora", "2", "--lr", "1", "--tensorboard", "--sample-every", "0"]) == 0
    lora = tmp_path / "run" / "lora.safetensors"
    assert capsys.readouterr().out.split() == [str(lora)]
    assert lora.stat().st_size < 0.1 * (random_model / "sd3_tiny.safetensors").stat().st_size
    assert main(["inspect", str(lora)]) == 0
    assert "LoRA" in capsys.readouterr().out
    model = random_model / "sd3_tiny.safetensors"
    plain, changed, none = (
        drawn(model, tmp_path / "x.png", *more)
        for more in ([], ["--lora", str(lora)], ["--lora", f"{lora}:0.5", "--lora", f"{lora}:-0.5"])
    )
    assert (plain != changed).any()
    assert np.abs(plain.astype(int) - none.astype(int)).max() <= 1
    assert (
        main(["generate", "--from", str(tmp_path / "x.png"), "--device", "cpu", "--quiet", "--out", str(tmp_path / "y.png")]) == 0
    )
    assert (np.asarray(Image.open(tmp_path / "y.png")) == none).all()
    assert main(["generate", "x", "--model", str(model), "--lora", str(model), "--device", "cpu"]) == 2
    assert "is no LoRA of this transformer's linear layers: it holds" in capsys.readouterr().err
    assert scalars(next((tmp_path / "run" / "lora").glob("events.out.tfevents*"))) == [
        (row["step"], pytest.approx(row["loss"], abs=1e-5))
        for row in map(json.loads, (tmp_path / "run" / "lora" / "log.jsonl").read_text().splitlines())
    ]


def scalars(file: Path) -> list[tuple[int, float]]:
    """Steps and losses in an event file: records of length (8 bytes), its checksum (4), an event, its checksum (4)."""
    rest, found = file.read_bytes(), []
    while rest:
        length = int.from_bytes(rest[:8], "little")
        event = event_pb2.Event.FromString(rest[12 : 12 + length])
        found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "loss"]
        rest = rest[16 + length :]
    return found


def test_without_the_package_for_tensorboard_there_is_one_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main([*words, "--tensorboard"]) == 2
    assert "needs a package more: pip install 'minisd3[tensorboard]'" in capsys.readouterr().err


def test_new_weights_take_the_place_of_the_files(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "--fresh", "--steps", "1", "--sample-every", "0"]) == 0
    made = weights.load_mmdit(tmp_path / "run" / "model.safetensors")
    last = made.get_parameter("final_layer.linear.weight")
    assert last.abs().max() < 1e-6  # it began at zero, and one step of a warm-up moves it by a ten-millionth


WRONG = [
    (["--preset", "sd3.5-medium"], "sd3_tiny.safetensors holds a transformer of tiny, not of sd3.5-medium"),
    (["--size", "40"], "--size is 40; it must be a multiple of 16, and at most 384"),
    (["--init", "none.safetensors"], "there is no file none.safetensors; --init takes a released .safetensors"),
    (["--size", "0"], "--size is 0; it must be a multiple of 16"),
    (["--lora", "2", "--fresh"], "--fresh has no use for --lora"),
    (["--lora", "0"], "--lora is 0; it must be at least 1"),
    (["--accumulate", "0"], "--accumulate is 0; it must be at least 1"),
    (["--save-every", "0"], "--save-every is 0; it must be at least 1"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_a_mistake_ends_in_one_line(words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_batch_that_cannot_be_shared_is_refused_before_data_is_prepared(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    assert main([*words, "--batch", "3"]) == 2
    assert "a batch of 3 cannot be shared by 2 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_released_preset_needs_its_file(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mmdit", "--data", str(photos), "--preset", "sd3.5-medium"]) == 2
    assert (
        "training sd3.5-medium begins with its released file; name that: --init sd3.5-medium.safetensors" in capsys.readouterr().err
    )
    assert main(["train", "vae", "--data", str(photos)]) == 2
    assert "--data is for the transformer" in capsys.readouterr().err
    assert finetune.source(None, None)[1] == PRESETS["tiny"]


def test_two_processes_train_by_the_same_command(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun -m minisd3: a LoRA, in shards by two, against one; pictures, logs and results are the first process's."""
    monkeypatch.setattr(
        training, "autocast", lambda device: contextlib.nullcontext()
    )  # and for the two, instructions without bf16:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"}
    more = ["--sample-every", "2", "--lr", "0.1", "--lora", "2"]
    assert main([*words, *more, "--folder", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minisd3"]
    command = [*torchrun, *words, *more, "--folder", str(tmp_path / "two"), "--parallel", "fsdp"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two" / "lora.safetensors")]
    one, two = (load_file(tmp_path / name / "lora.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and max(float(x.abs().max()) for x in one.values()) > 1e-3
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    sheets = [np.asarray(Image.open(tmp_path / name / "lora" / "samples" / "000002.png")).astype(int) for name in ("one", "two")]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
