"""The notebooks as files: executed, clean, small, readable, and with exercises whose checks tell right from wrong. No kernel runs here."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import nbformat
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
KINDS = {"text/plain", "text/markdown", "image/png"}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def cells(path: Path) -> list[Any]:
    return nbformat.read(path, as_version=4).cells


@pytest.fixture
def code(cells: list[Any]) -> list[Any]:
    return [cell for cell in cells if cell.cell_type == "code"]


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def lines(cell: Any) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def test_there_are_notebooks() -> None:
    assert PATHS


def test_it_is_a_valid_notebook(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))


def test_it_was_run_from_top_to_bottom(code: list[Any]) -> None:
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_it_shows_no_error_and_no_warning(code: list[Any]) -> None:
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error" or "raises-exception" in tags(cell), cell.source
            assert output.get("name") != "stderr", cell.source


def test_it_holds_text_and_png_only(path: Path, code: list[Any]) -> None:
    assert {kind for cell in code for output in cell.outputs for kind in output.get("data", {})} <= KINDS
    assert "widgets" not in nbformat.read(path, as_version=4).metadata


def test_every_picture_has_an_alternative_text(code: list[Any]) -> None:
    for cell in code:
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert not output.data.get("text/plain", "<").startswith("<"), cell.source


def test_it_is_small(path: Path) -> None:
    assert path.stat().st_size < 1_000_000


def test_headings_begin_with_one_title_and_skip_no_level(cells: list[Any]) -> None:
    assert cells[0].source.startswith("# ")
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    levels = [len(found) for found in re.findall(r"^(#+) ", text, flags=re.MULTILINE)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_cells_are_short(cells: list[Any], code: list[Any]) -> None:
    assert 25 <= len(code) <= 45
    assert median(map(lines, code)) <= 6
    assert max(map(lines, code)) <= 30
    assert len(cells) - len(code) >= len(code) / 2


def test_cells_use_what_nbval_and_a_second_thread_can_bear(code: list[Any]) -> None:
    for cell in code:
        assert not cell.source.rstrip().endswith(";"), cell.source
        assert not re.search(r"\binteract\b|interactive_output|\bOutput\(|pyplot", cell.source), cell.source


def test_three_predictions_and_three_exercises(cells: list[Any]) -> None:
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert len(re.findall(r"\*\*Predict, then run \(\d\)\.\*\*", text)) >= 3
    assert len(re.findall(r"\*\*Exercise \d\.\*\*", text)) >= 3
    ids = {cell.id for cell in cells}
    assert {f"{kind}-{n}" for kind in ("exercise", "check") for n in (1, 2, 3)} <= ids


# --- exercises: what a check says to a right answer, and to wrong ones --------------------------------------------------------------


def check(notebook: str, number: int, answer: str) -> str:
    """What the notebook's check prints for an answer, which takes the place of the exercise's cell."""
    cells = {cell.id: cell.source for cell in nbformat.read(FOLDER / notebook, as_version=4).cells}
    said: list[str] = []
    space = {"torch": torch, "F": torch.nn.functional, "print": lambda *words: said.append(" ".join(map(str, words)))}
    exec(answer, space)  # noqa: S102
    exec(cells[f"check-{number}"], space)  # noqa: S102
    return "\n".join(said)


GUIDED = "def guided(v_cond, v_uncond, scale):\n    return {}"
HEUN = """
def heun_step(velocity, x, t, t_next):
    v = velocity(x, t)
    end = x + (t_next - t) * v
    return {}
"""
SAMPLING = [
    (1, GUIDED.format("v_uncond + scale * (v_cond - v_uncond)"), "right"),
    (1, GUIDED.format("scale * v_cond + (1 - scale) * v_uncond"), "right"),
    (1, GUIDED.format("v_cond + scale * (v_cond - v_uncond)"), "start from v_uncond"),
    (1, GUIDED.format("v_cond + scale * (v_uncond - v_cond)"), "away from the prompt"),
    (1, GUIDED.format("v_cond"), "the result is (9, 1)"),
    (1, GUIDED.format("None"), "not written yet"),
    (2, HEUN.format("x + (t_next - t) * (v + velocity(end, t_next)) / 2"), "right"),
    (2, HEUN.format("end"), "Euler's step"),
    (2, HEUN.format("x + (t_next - t) * velocity(end, t_next)"), "far end"),
    (2, HEUN.format("x + (t_next - t) * velocity((x + end) / 2, (t + t_next) / 2)"), "midpoint"),
    (2, HEUN.format("x + (t_next - t) * (v + velocity(end, t)) / 2"), "old time"),
    (2, HEUN.format("x"), "ends at 1.375"),
    (2, HEUN.format("None"), "not written yet"),
    (3, "answer = 62", "right"),
    (3, "answer = 72", "three whole passes"),
    (3, "answer = 69", "need not repeat"),
    (3, "answer = 65", "leaves out 7, 8 and 9"),
    (3, "answer = 50", "not yet"),
    (3, "answer = None", "not answered yet"),
]


@pytest.mark.parametrize(("number", "answer", "said"), SAMPLING)
def test_checks_of_sampling(number: int, answer: str, said: str) -> None:
    result = check("05_sampling_cfg_slg.ipynb", number, answer)
    assert said in result
    assert result.startswith("right") == (said == "right")


DOWN = "def down(x, weight, bias):\n    return F.conv2d(F.pad(x, {}), weight, {}, stride={})"
KL = "def kl(mean, logvar):\n    return {}"
CONSTANTS = "shift, scale, latent_of_2 = {}"
LATENTS = [
    (1, DOWN.format((0, 1, 0, 1), "bias", 2), "right"),
    (1, DOWN.format((1, 1, 1, 1), "bias", 2), "on the left and at the top as well"),
    (1, DOWN.format((1, 0, 0, 1), "bias", 2), "on the left; F.pad counts"),
    (1, DOWN.format((0, 1, 1, 0), "bias", 2), "at the top; F.pad counts"),
    (1, DOWN.format((0, 0, 0, 0), "bias", 2), "nothing was padded"),
    (1, DOWN.format((0, 1, 0, 1), "None", 2), "the bias is missing"),
    (1, DOWN.format((0, 1, 0, 1), "bias", 1), "the stride is 2"),
    (1, DOWN.format((0, 1, 0, 1), "2 * bias", 2), "the values are not"),
    (1, "def down(x, weight, bias):\n    ...", "not written yet"),
    (2, KL.format("0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()"), "right"),
    (2, KL.format("0.5 * (mean**2 + logvar.exp() - 1 - logvar)"), "average them"),
    (2, KL.format("mean**2 + logvar.exp()"), "average them"),
    (2, KL.format("0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()"), "you added them up"),
    (2, KL.format("(mean**2 + logvar.exp() - 1 - logvar).mean()"), "one half is missing"),
    (2, KL.format("0.5 * (1 + logvar - mean**2 - logvar.exp()).mean()"), "never negative"),
    (2, KL.format("0.5 * (mean**2 + (logvar / 2).exp() - 1 - logvar).mean()"), "is the variance"),
    (2, KL.format("0.5 * (mean + logvar.exp() - 1 - logvar).mean()"), "enters squared"),
    (2, KL.format("mean.mean()"), "and yours 1.0000"),
    (2, KL.format("None"), "not written yet"),
    (3, CONSTANTS.format("3, 2, 4"), "right"),
    (3, CONSTANTS.format("-3, 2, 4"), "mind the sign"),
    (3, CONSTANTS.format("1, 2, 4"), "what is subtracted"),
    (3, CONSTANTS.format("3, 0.5, 4"), "the scale is its inverse"),
    (3, CONSTANTS.format("3, 2, 10"), "the other way round"),
    (3, CONSTANTS.format("3, 2, -2"), "you normalised 2"),
    (3, CONSTANTS.format("3, 2, 7"), "divides by the scale"),
    (3, CONSTANTS.format("3, 2, 5"), "solves (latent - 3) * 2 = 2"),
    (3, CONSTANTS.format("None, None, None"), "not answered yet"),
]


@pytest.mark.parametrize(("number", "answer", "said"), LATENTS)
def test_checks_of_the_vae(number: int, answer: str, said: str) -> None:
    result = check("01_vae.ipynb", number, answer)
    assert said in result
    assert result.startswith("right") == (said == "right")


# --- shape tables as they are printed, against the released files -----------------------------------------------------------------


def tables(notebook: str) -> list[list[dict[str, str]]]:
    """The shape tables that a notebook shows, a row as column: text."""
    shown = []
    for cell in nbformat.read(FOLDER / notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            table = output.get("data", {}).get("text/markdown", "")
            if table.startswith("| name | kind | input |"):
                header, _, *rows = ([word.strip() for word in line.split("|")[1:-1]] for line in table.splitlines())
                shown.append([dict(zip(header, row, strict=True)) for row in rows])
    return shown


def assert_as_released(table: list[dict[str, str]], file: str, prefix: str) -> None:
    """Every row has as many parameters as the released file under its name; position tables are none."""
    names = json.loads((Path(__file__).parent / "facts" / f"{file}.keys.json").read_text())
    for row in table:
        begin = prefix + re.sub(r"(\d+)-\d+", r"\1", row["name"]) + "." * bool(row["name"])
        held = [shape for name, shape in names.items() if name.startswith(begin) and not name.endswith("pos_embed")]
        assert sum(torch.Size(shape).numel() for shape in held) == int(row["parameters"].replace(",", "")) > 0, row


def test_the_released_vae_is_shown_as_its_file_holds_it() -> None:
    _, encoder, decoder = tables("01_vae.ipynb")
    assert_as_released(encoder, "sd3.5_medium", "first_stage_model.encoder.")
    assert_as_released(decoder, "sd3.5_medium", "first_stage_model.decoder.")


def test_the_released_transformers_are_shown_as_their_files_hold_them() -> None:
    _, *released, typed = tables("02_patchify_timestep.ipynb")
    files = ("sd3_medium", "sd3.5_medium", "sd3.5_large")
    for table, file in [*zip(released, files, strict=True), (typed, "sd3.5_medium")]:
        assert_as_released(table, file, "model.diffusion_model.")
    assert [table[1]["output"] for table in released] == ["(1 4096 1536)", "(1 4096 1536)", "(1 4096 2432)"]
    assert typed[1]["output"] == "(1 4032 1536)"  # 768 x 1344 pixels


BACK = "def my_unpatchify(tokens, height, width, p):\n    six = tokens.unflatten(2, (p, p, -1)).unflatten(1, (height, width))\n    return {}"
TIME = "def embedding(t, frequency):\n    return torch.cat([{}, {}])"
PATCHES = [
    (1, BACK.format("six.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)"), "right"),
    (1, BACK.format("six.permute(0, 5, 1, 4, 2, 3).flatten(4, 5).flatten(2, 3)"), "changed places"),
    (1, BACK.format("six.permute(0, 5, 3, 1, 4, 2).flatten(4, 5).flatten(2, 3)"), "interleaved"),
    (1, BACK.format("six.flatten().view(2, 3, 4, 6)"), "must be permuted"),
    (1, BACK.format("tokens.view(2, 2, 3, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 4, 6)"), "it is the fastest"),
    (1, BACK.format("tokens.flatten().flip(0).view(2, 3, 4, 6)"), "the order is not"),
    (1, BACK.format("six"), "should be (2, 3, 4, 6)"),
    (1, BACK.format("None"), "not written yet"),
    (2, "answer = 48 * 84", "right"),
    (2, "answer = 258048", "the VAE comes first"),
    (2, "answer = 16128", "a patch is 2 x 2 of them"),
    (2, "answer = 132", "multiply them"),
    (2, "answer = 4096", "a square of 1024"),
    (2, "answer = 1", "divide both sides"),
    (2, "answer = None", "not answered yet"),
    (3, TIME.format("(1000 * t * frequency).cos()", "(1000 * t * frequency).sin()"), "right"),
    (3, TIME.format("(1000 * t * frequency).sin()", "(1000 * t * frequency).cos()"), "the cosines come first"),
    (3, TIME.format("(t * frequency).cos()", "(t * frequency).sin()"), "the factor 1000 is missing"),
    (3, TIME.format("(1000 * t / frequency).cos()", "(1000 * t / frequency).sin()"), "you divided"),
    (3, TIME.format("(1000 * t * frequency).cos()", "frequency[:0]"), "yours has the shape (3,)"),
    (3, TIME.format("frequency", "frequency"), "not the right ones"),
    (3, "def embedding(t, frequency):\n    return frequency.cos(), frequency.sin()", "yours is a tuple"),
    (3, "def embedding(t, f):\n    a = 1000 * t * f\n    return torch.stack([a.cos(), a.sin()], 1).flatten()", "take turns"),
    (3, "def embedding(t, frequency):\n    ...", "not written yet"),
]


@pytest.mark.parametrize(("number", "answer", "said"), PATCHES)
def test_checks_of_patches_and_times(number: int, answer: str, said: str) -> None:
    result = check("02_patchify_timestep.ipynb", number, answer)
    assert said in result
    assert result.startswith("right") == (said == "right")


def test_the_blocks_are_shown_as_the_released_files_hold_them() -> None:
    tiny, *released, typed = tables("03_mmdit.ipynb")
    files = ("sd3_medium", "sd3.5_medium", "sd3.5_large")
    for table, file in [*zip(released, files, strict=True), (typed, "sd3.5_medium")]:
        assert_as_released(table, file, "model.diffusion_model.")
    assert [table[5]["times"] for table in (*released, typed)] == ["23", "13", "37", "13"]
    assert tiny[0]["output"] == "(1 16 16 16)" and typed[0]["output"] == "(1 16 96 168)"


def test_the_text_encoders_are_shown_as_the_released_files_hold_them() -> None:
    _, *released, typed = ([row for row in table if row["parameters"] != "0"] for table in tables("04_text_conditioning.ipynb"))
    for table, file in zip((*released, typed), ("clip_l", "clip_g", "t5xxl", "t5xxl"), strict=True):
        assert_as_released(table[1:], file, "")
    assert [table[0]["parameters"] for table in released] == ["123,650,304", "694,659,840", "4,762,310,656"]
    assert typed[0]["output"] == "(1 256 4096)"


ATTEND = "def attend(q, k, v):\n    return {}"
BRANCH = "def branch(x, f, shift, scale, gate):\n    return {}"
MMDIT = [
    (1, ATTEND.format("torch.softmax(q @ k.T / q.shape[1] ** 0.5, dim=1) @ v"), "right"),
    (1, ATTEND.format("torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]"), "right"),
    (1, ATTEND.format("torch.softmax(q @ k.T, dim=1) @ v"), "not divided by the root"),
    (1, ATTEND.format("torch.softmax(q @ k.T / q.shape[1], dim=1) @ v"), "divide by its square root"),
    (1, ATTEND.format("torch.softmax(q @ k.T / q.shape[1] ** 0.5, dim=0) @ v"), "over the queries"),
    (1, ATTEND.format("torch.softmax(k @ q.T / q.shape[1] ** 0.5, dim=1) @ v"), "changed places"),
    (1, ATTEND.format("q @ k.T / q.shape[1] ** 0.5 @ v"), "no softmax"),
    (1, ATTEND.format("q @ k.T"), "yours is (5, 5)"),
    (1, ATTEND.format("None"), "not written yet"),
    (2, BRANCH.format("x + gate * f(x * (1 + scale) + shift)"), "right"),
    (2, BRANCH.format("x + gate * f(x * scale + shift)"), "1 + scale"),
    (2, BRANCH.format("gate * f(x * (1 + scale) + shift)"), "added to x"),
    (2, BRANCH.format("x + f(x * (1 + scale) + shift)"), "gate is missing"),
    (2, BRANCH.format("x + gate * f((x + shift) * (1 + scale))"), "the shift comes after the scale"),
    (2, BRANCH.format("x + f(gate * (x * (1 + scale) + shift))"), "not what goes into it"),
    (2, BRANCH.format("x"), "is 50, and yours 2.0"),
    (2, BRANCH.format("None"), "not written yet"),
    (3, "answer = 325", "right"),
    (3, "answer = 323", "final layer"),
    (3, "answer = 329", "has 2, not 6"),
    (3, "answer = 327", "and the final layer adds 2"),
    (3, "answer = 290", "has 9, not 6"),
    (3, "answer = 286", "has 9, not 6"),
    (3, "answer = 288", "not all 24 blocks are alike"),
    (3, "answer = 364", "the picture's alone"),
    (3, "answer = 1", "add up"),
    (3, "answer = None", "not answered yet"),
]


@pytest.mark.parametrize(("number", "answer", "said"), MMDIT)
def test_checks_of_mmdit(number: int, answer: str, said: str) -> None:
    result = check("03_mmdit.ipynb", number, answer)
    assert said in result
    assert result.startswith("right") == (said == "right")


CAUSAL = "def causal(fits):\n    {}"
POOL = "def pool(states, ids):\n    return {}"
JOIN = "def join(l, g, t5):\n    return {}"
SIDE = "torch.nn.functional.pad(torch.cat([{}], 2), ({}))"
LATER = "later = torch.ones_like(fits).triu({}).bool()\n    "
TEXT = [
    (1, CAUSAL.format(LATER.format(1) + "return torch.softmax(fits.masked_fill(later, -torch.inf), 1)"), "right"),
    (1, CAUSAL.format("return torch.softmax(fits + torch.full_like(fits, -torch.inf).triu(1), -1)"), "right"),
    (
        1,
        CAUSAL.format(LATER.format(1) + "return torch.softmax(fits.masked_fill(later.T, -torch.inf), 1)"),
        "only those behind them",
    ),
    (1, CAUSAL.format("return torch.softmax(fits, 1).tril()"), "no longer sum to 1"),
    (1, CAUSAL.format("return torch.softmax(fits.tril(), 1)"), "mask with -inf"),
    (1, CAUSAL.format(LATER.format(0) + "return torch.softmax(fits.masked_fill(later, -torch.inf), 1)"), "read itself, too"),
    (1, CAUSAL.format(LATER.format(1) + "return torch.softmax(fits.masked_fill(later, -torch.inf), 0)"), "over the queries"),
    (1, CAUSAL.format("return fits"), "some weights are wrong"),
    (1, CAUSAL.format("return fits[0]"), "have the shape (4,)"),
    (1, CAUSAL.format("..."), "not written yet"),
    (2, POOL.format("states[ids.argmax()]"), "right"),
    (2, POOL.format("states[(ids == ids.max()).nonzero()[0, 0]]"), "right"),
    (2, POOL.format("states[-1]"), "padding"),
    (2, POOL.format("states[0]"), "start token"),
    (2, POOL.format("states[ids.argmax() - 1]"), "the last word"),
    (2, POOL.format("states.mean(0)"), "the mean of all"),
    (2, POOL.format("states[ids == ids.max()]"), "the shape (3, 2)"),
    (2, POOL.format("states[1]"), "end token is at place 3"),
    (2, POOL.format("None"), "not written yet"),
    (3, JOIN.format("torch.cat([" + SIDE.format("l, g", "0, 3") + ", t5], 1)"), "right"),
    (3, JOIN.format("torch.cat([t5, " + SIDE.format("l, g", "0, 3") + "], 1)"), "CLIP's tokens come first"),
    (3, JOIN.format("torch.cat([" + SIDE.format("g, l", "0, 3") + ", t5], 1)"), "CLIP-L comes before"),
    (3, JOIN.format("torch.cat([" + SIDE.format("l, g", "3, 0") + ", t5], 1)"), "zeros come behind"),
    (3, JOIN.format("torch.cat([" + SIDE.format("l", "0, 6") + ", " + SIDE.format("g", "0, 5") + ", t5], 1)"), "side by side"),
    (3, JOIN.format("torch.zeros(1, 7, 8)"), "not what stands where"),
    (3, JOIN.format("None"), "not written yet"),
]


@pytest.mark.parametrize(("number", "answer", "said"), TEXT)
def test_checks_of_text(number: int, answer: str, said: str) -> None:
    result = check("04_text_conditioning.ipynb", number, answer)
    assert said in result
    assert result.startswith("right") == (said == "right")


UPDATE = "def update(average, weights, decay):\n    return {{n: {} for n, w in weights.items()}}"
TIMES = "def draw_times(n, mean, spread, generator):\n    normal = torch.randn(n, generator=generator)\n    return {}"
COUNTS = "at_once, in_a_step = {}"
TRAINING = [
    (1, UPDATE.format("decay * average[n] + (1 - decay) * w"), "right"),
    (1, UPDATE.format("average[n].lerp_(w, 1 - decay)"), "right"),
    (1, UPDATE.format("(1 - decay) * average[n] + decay * w"), "changed places"),
    (1, UPDATE.format("(1 - decay) * w"), "the old average is missing"),
    (1, UPDATE.format("w"), "the weights themselves"),
    (1, UPDATE.format("(average[n] + w) / 2"), "half of each"),
    (1, UPDATE.format("average[n]"), "and yours to 4.0"),
    (1, "def update(average, weights, decay):\n    ...", "not written yet"),
    (2, TIMES.format("torch.sigmoid(mean + spread * normal)"), "right"),
    (2, TIMES.format("mean + spread * normal"), "some of your times are no times"),
    (2, TIMES.format("mean + spread * torch.sigmoid(normal)"), "belong inside the sigmoid"),
    (2, TIMES.format("torch.sigmoid(normal)"), "are not used"),
    (2, TIMES.format("torch.sigmoid(spread * normal)"), "yours is not moved"),
    (2, TIMES.format("torch.sigmoid(spread * (mean + normal))"), "not the mean as well"),
    (2, TIMES.format("torch.sigmoid(mean + normal)"), "the spread is missing"),
    (2, TIMES.format("torch.sigmoid(mean + spread * normal[:3])"), "yours have the shape (3,)"),
    (2, TIMES.format("torch.rand(n, generator=generator)"), "the values are others"),
    (2, TIMES.format("None"), "not written yet"),
    (3, COUNTS.format("8, 256"), "right"),
    (3, COUNTS.format("64, 256"), "64 is all processes together"),
    (3, COUNTS.format("2, 256"), "one after the other"),
    (3, COUNTS.format("16, 256"), "does not make a batch smaller"),
    (3, COUNTS.format("1, 256"), "shared by 8 processes"),
    (3, COUNTS.format("8, 64"), "one batch of the four"),
    (3, COUNTS.format("8, 32"), "what one process sees"),
    (3, COUNTS.format("8, 2048"), "not multiplied by the processes"),
    (3, COUNTS.format("8, 1"), "4 batches of 64"),
    (3, COUNTS.format("None, None"), "not answered yet"),
]


@pytest.mark.parametrize(("number", "answer", "said"), TRAINING)
def test_checks_of_training(number: int, answer: str, said: str) -> None:
    result = check("07_training.ipynb", number, answer)
    assert said in result
    assert result.startswith("right") == (said == "right")


FEEDS = "def feeds(i, blocks, residuals):\n    return {}"
F1 = """
def near(edges, within=8):
    return F.max_pool2d(edges[None].float(), 2 * within + 1, 1, within)[0] > 0

def f1(drawn, wanted):
    p, r = (drawn & {0}(wanted)).sum() / drawn.sum(), (wanted & {0}(drawn)).sum() / wanted.sum()
    return {1}
"""
CONTROL = [
    (1, FEEDS.format("i * residuals // blocks"), "right"),
    (1, FEEDS.format("i // (blocks // residuals)"), "right"),
    (1, FEEDS.format("i % residuals"), "take turns"),
    (1, FEEDS.format("0"), "same one everywhere"),
    (1, FEEDS.format("residuals - 1 - i * residuals // blocks"), "turned round"),
    (1, FEEDS.format("i * residuals // blocks + 1"), "count residuals from 1"),
    (1, FEEDS.format("i * residuals / blocks"), "round down"),
    (1, FEEDS.format("i // 2"), "not for 24 blocks"),
    (1, FEEDS.format("i"), "block 1 takes residual 0, and yours 1"),
    (1, FEEDS.format("None"), "not written yet"),
    (2, F1.format("near", "2 * p * r / (p + r)"), "right"),
    (2, F1.format("near", "2 / (1 / p + 1 / r)"), "right"),
    (2, F1.format("near", "p"), "precision alone"),
    (2, F1.format("near", "r"), "recall alone"),
    (2, F1.format("near", "(p + r) / 2"), "plain mean"),
    (2, F1.format("near", "p * r / (p + r)"), "factor 2"),
    (2, F1.format("", "2 * p * r / (p + r)"), "not only on it"),
    (2, F1.format("near", "p * r"), "18 of 40"),
    (2, F1.format("near", "None"), "not written yet"),
    (3, "answer = 114", "right"),
    (3, "answer = 57", "one pass"),
    (3, "answer = 76", "base alone"),
    (3, "answer = 95", "runs for both passes"),
    (3, "answer = 152", "two ControlNets"),
    (3, "answer = 38", "runs both networks twice"),
    (3, "answer = None", "not answered yet"),
]


@pytest.mark.parametrize(("number", "answer", "said"), CONTROL)
def test_checks_of_controlnet(number: int, answer: str, said: str) -> None:
    result = check("06_controlnet.ipynb", number, answer)
    assert said in result
    assert result.startswith("right") == (said == "right")


def test_the_released_controlnet_is_shown_as_its_file_holds_it() -> None:
    _, (whole, *parts), _ = tables("06_controlnet.ipynb")
    assert whole["output"] == "19 x (1 4096 2432)"
    assert_as_released(parts, "sd3.5_large_controlnet", "")


# --- the runner -------------------------------------------------------------------------------------------------------------------

PAGE = """
import warnings
from IPython.display import display
print("one"); print("two")
display({"image/jpeg": "AAAA", "image/png": "AAAA", "text/plain": "a picture", "text/html": "<b>a picture</b>"}, raw=True)
"""


def write(path: Path, *sources: str) -> Path:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FOLDER / "run.py", *arguments], capture_output=True, text=True, check=False)


def test_the_runner_writes_the_same_bytes_twice_and_notices_changes(tmp_path: Path) -> None:
    page = write(tmp_path / "page.ipynb", PAGE, "1 + 1")
    assert "MiB" in run(page).stdout
    first = page.read_bytes()
    assert run(page).returncode == 0
    assert page.read_bytes() == first
    code = nbformat.read(page, as_version=4).cells
    assert code[0].outputs[0].text == "one\ntwo\n"
    assert set(code[0].outputs[1].data) == {"image/png", "text/plain"}
    page.write_text(page.read_text().replace('"2"', '"3"'))
    changed = run("--check", page)
    assert changed.returncode == 1
    assert "cell [2] shows something else" in changed.stderr


def test_kernels_see_no_gpu_unless_asked_to(tmp_path: Path) -> None:
    page = write(tmp_path / "page.ipynb", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))")
    assert run(page).returncode == 0
    assert nbformat.read(page, as_version=4).cells[0].outputs[0].text == "\n"
    before = page.read_bytes()
    assert run("--gpu", page).returncode == 0
    assert page.read_bytes() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here to run the notebooks on")
def test_it_runs_on_a_gpu(path: Path) -> None:
    result = run("--gpu", path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings; warnings.warn('careful')", "careful"),
        ("while True: pass", "longer than 2 s"),
    ],
)
def test_the_runner_refuses_errors_warnings_and_endless_cells(tmp_path: Path, source: str, said: str) -> None:
    page = write(tmp_path / "page.ipynb", source)
    before = page.read_bytes()
    result = run("--timeout", "2", page)
    assert result.returncode == 1
    assert said in result.stderr
    assert page.read_bytes() == before
