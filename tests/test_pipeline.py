"""From prompt to picture: equal to diffusers' pipelines with the same weights and noise, and every choice of load and generate."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.testing import assert_close

from minisd3 import flow, pipeline
from minisd3.config import PRESETS, SkipLayers
from minisd3.guidance import skip_layer
from minisd3.mmdit import MMDiT
from minisd3.pipeline import SD3, State, load
from minisd3.types import Conditioning

PROMPT, OTHER = "a red house beside a tree", "two boats at night"
SMALL: dict[str, Any] = {"size": 64, "steps": 3, "progress": False}


@pytest.fixture(scope="module")
def sd3(random_model: Path) -> SD3:
    return load(random_model / "sd3_tiny.safetensors", controlnet=random_model / "control.safetensors", device="cpu")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    values = torch.rand(8, 8, 3, generator=Generator().manual_seed(0)).mul(255).byte().numpy()
    return Image.fromarray(values).resize((64, 64), Image.Resampling.BICUBIC)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of each forward pass of the transformer."""
    seen: list[int] = []
    forward = MMDiT.forward

    def counted(self: MMDiT, x: Tensor, *args: Any, **named: Any) -> Tensor:
        seen.append(len(x))
        return forward(self, x, *args, **named)

    monkeypatch.setattr(MMDiT, "forward", counted)
    return seen


def noise(*seeds: int, side: int = 8) -> Tensor:
    return torch.stack([torch.randn(16, side, side, generator=Generator().manual_seed(seed)) for seed in seeds])


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def latent(sd3: SD3) -> Tensor:
    assert sd3.last_state is not None
    return sd3.last_state.latent


# --- against diffusers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(sd3: SD3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same model, as the parts of diffusers' pipelines."""
    import diffusers
    from transformers import CLIPTokenizer

    from minisd3 import weights

    folder, text = tmp_path_factory.mktemp("diffusers"), sd3.text
    weights.save_diffusers(folder / "transformer", sd3.mmdit)
    weights.save_diffusers(folder / "vae", sd3.vae)
    tokenizers = Path(pipeline.__file__).parent / "models/tiny/text_encoders/clip_tokenizer"
    length = text.config.clip_length
    return {
        "transformer": diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer"),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": text.clip_l,
        "text_encoder_2": text.clip_g,
        "text_encoder_3": text.t5,
        "tokenizer": CLIPTokenizer.from_pretrained(tokenizers, model_max_length=length),
        "tokenizer_2": CLIPTokenizer.from_pretrained(tokenizers, model_max_length=length, pad_token="!"),
        "tokenizer_3": text.t5_tokenizer,
    }


def diffusers_call(pipe: Any, **named: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, guidance_scale=4.5, num_inference_steps=4, max_sequence_length=20, **named).images


OURS: dict[str, Any] = {"size": 64, "steps": 4, "cfg": 4.5, "shift": 3.0, "sampler": "euler", "seed": 7, "progress": False}


def test_text_to_image_equals_diffusers(sd3: SD3, parts: dict[str, Any]) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline(**parts)
    size = {"height": 64, "width": 64}
    theirs = diffusers_call(pipe, latents=noise(7), negative_prompt=OTHER, output_type="latent", **size)
    pictures = sd3.generate(PROMPT, negative=OTHER, **OURS)
    assert_close(latent(sd3), theirs, rtol=0, atol=1e-4)

    [rounded] = pipeline.to_pil(sd3.vae.decode_sliced(sd3.vae.denormalize(latent(sd3))), rounding="nearest")
    [expected] = diffusers_call(pipe, latents=noise(7), negative_prompt=OTHER, **size)
    assert np.abs(array(rounded) - array(expected)).max() <= 1
    assert np.isin(array(rounded) - array(pictures[0]), (0, 1)).all()  # the released code rounds down


def test_skip_layer_guidance_equals_diffusers(sd3: SD3, parts: dict[str, Any]) -> None:
    from diffusers import StableDiffusion3Pipeline

    window = {"skip_layer_guidance_scale": 1.5, "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.6}
    pipe = StableDiffusion3Pipeline(**parts)
    theirs = diffusers_call(
        pipe, latents=noise(7), output_type="latent", skip_guidance_layers=[2, 3], **window, height=64, width=64
    )
    sd3.generate(PROMPT, **OURS, slg=SkipLayers((2, 3), 1.5, 0.01, 0.6))
    assert_close(latent(sd3), theirs, rtol=0, atol=1e-4)


def test_image_to_image_equals_diffusers(sd3: SD3, parts: dict[str, Any], photo: Image.Image) -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline

    generator = Generator().manual_seed(7)
    sd3.noise([generator], 64)
    start = sd3.encode_image(photo, (64, 64), [generator])  # the very sample that generate draws
    pipe = StableDiffusion3Img2ImgPipeline(**parts)
    theirs = diffusers_call(pipe, image=start, strength=0.7, generator=Generator().manual_seed(7), output_type="latent")
    sd3.generate(PROMPT, **OURS, image=photo, strength=0.7)
    assert_close(latent(sd3), theirs, rtol=0, atol=1e-4)


def test_a_folder_that_diffusers_saved_draws_the_same(sd3: SD3, parts: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipe: Any = StableDiffusion3Pipeline(**parts)
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu")
    assert loaded.preset == sd3.preset
    assert loaded.generate(PROMPT, **SMALL) == sd3.generate(PROMPT, **SMALL)


# --- generate ---------------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_picture_alone_or_in_a_batch(sd3: SD3) -> None:
    batch = sd3.generate([PROMPT, OTHER], seed=[3, 4], **SMALL)
    alone = [sd3.generate(prompt, seed=seed, **SMALL)[0] for prompt, seed in ((PROMPT, 3), (OTHER, 4))]
    for one, other in zip(batch, alone, strict=True):
        assert np.abs(array(one) - array(other)).max() <= 1
    [same, again] = sd3.generate([PROMPT, PROMPT], seed=3, **SMALL)
    assert np.abs(array(same) - array(again)).max() <= 1
    assert (array(batch[0]) != array(batch[1])).any()


def test_several_seeds_draw_one_prompt(sd3: SD3) -> None:
    pictures = sd3.generate(PROMPT, seed=range(2), **SMALL)
    assert [(picture.info["prompt"], picture.info["seed"]) for picture in pictures] == [(PROMPT, 0), (PROMPT, 1)]
    with pytest.raises(ValueError, match="2 prompts for 3 pictures"):
        sd3.generate([PROMPT, OTHER], seed=[1, 2, 3], **SMALL)


def test_defaults_come_from_the_preset(sd3: SD3) -> None:
    assert sd3.settings() == (20, 4.0, None, "dpmpp_2m", 1.0)
    assert sd3.settings(slg=True).slg == PRESETS["tiny"].slg
    assert sd3.settings(steps=3, cfg=1, sampler="heun", shift=2.0) == (3, 1, None, "heun", 2.0)
    for name, usual, controlled, skipping in (("sd3.5-medium", 5.0, 3.5, 4.0), ("sd3.5-large", 4.5, 3.5, None)):
        released = SD3(PRESETS[name], sd3.mmdit, sd3.vae, sd3.text)
        assert released.settings().cfg == usual
        assert released.settings(controlled=True)[:4] == (60, controlled, None, "euler")
        if skipping:
            own = SkipLayers((1,))
            assert released.settings(slg=own).cfg == usual
            with pytest.raises(ValueError, match=r"skips blocks \[7, 8, 9\]; this model's are 0 to 5"):
                released.settings(slg=True)
        else:
            with pytest.raises(ValueError, match="no skip-layer guidance; pass slg=SkipLayers"):
                released.settings(slg=True)
    with pytest.raises(ValueError, match="sampler is 'ddim'; choose one of euler, heun, dpmpp_2m"):
        sd3.generate(PROMPT, sampler="ddim", **SMALL)  # type: ignore[arg-type]


def test_scale_one_makes_no_unconditional_pass(sd3: SD3, passes: list[int]) -> None:
    sd3.generate(PROMPT, cfg=1.0, **SMALL)
    assert passes == [1, 1, 1]
    passes.clear()
    sd3.generate(PROMPT, cfg=3.0, **SMALL)
    assert passes == [2, 2, 2]
    passes.clear()
    times = flow.sd3_schedule(3, 1.0)
    sd3.generate(PROMPT, cfg=3.0, cfg_interval=(float(times[1]) - 0.01, float(times[1]) + 0.01), **SMALL)
    assert passes == [1, 2, 1]


def test_skip_layer_guidance_heeds_the_interval_of_cfg() -> None:
    class Model:
        """Predicts its context; without its layers, half of that."""

        def __call__(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
            return context

        def forward_branched(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, *, skip_layers: Any, rows: int) -> Any:
            assert len(x) == len(context)
            return context, context[:rows] / 2

    cond, uncond = (Conditioning(torch.full((1, 1), value), torch.zeros(1, 1)) for value in (4.0, 1.0))
    times = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    slg = SkipLayers((0,), scale=10.0, start=0.0, end=0.7)  # steps 1, 2 and 3
    velocity = skip_layer(Model(), cond, uncond, 2.0, slg, times, interval=(0.5, 0.7))
    x = torch.zeros(1, 1)
    assert [float(velocity(x, t)) for t in times[:5]] == [4, 4 + 10 * 2, 1 + 2 * 3 + 10 * 2, 4 + 10 * 2, 4]


def test_pictures_carry_their_settings(sd3: SD3) -> None:
    [picture] = sd3.generate(PROMPT, negative="fog", seed=5, slg=SkipLayers((1,)), size=(32, 64), steps=2, progress=False)
    assert picture.size == (64, 32)
    assert picture.info == {
        "prompt": PROMPT, "negative": "fog", "seed": 5, "height": 32, "width": 64, "steps": 2, "cfg": 4.0,
        "slg": {"layers": (1,), "scale": 2.5, "start": 0.01, "end": 0.2}, "sampler": "dpmpp_2m", "shift": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (60, "60 x 60 pixels cannot be cut into patches; make height and width multiples of 16"),
        ((64, 0), "64 x 0 pixels cannot be cut"),
        ((64, 400), "beyond this model's table of 24 x 24 positions; pass size=.* at most 384"),
    ],
)
def test_sizes_that_cannot_be_drawn(sd3: SD3, size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sd3.generate(PROMPT, size=size)


def test_the_other_schedule(sd3: SD3) -> None:
    times: list[float] = []
    sd3.generate(PROMPT, schedule=flow.uniform_schedule, callback=lambda step, state: times.append(state.t), **SMALL)
    assert times == flow.uniform_schedule(3, 1.0)[1:].tolist()


def test_tiled_decoding_is_nearly_the_same(sd3: SD3) -> None:
    x = 0.5 * noise(1, side=8)
    [whole], [tiled] = sd3.decode(x), sd3.decode(x, tiled=True)
    assert np.abs(array(whole) - array(tiled)).mean() < 1


# --- from a picture ---------------------------------------------------------------------------------------------------------------


def test_image_to_image_leaves_out_the_first_steps(sd3: SD3, passes: list[int], photo: Image.Image) -> None:
    sd3.generate(PROMPT, image=photo, strength=0.8, steps=10, size=64, progress=False)
    assert len(passes) == 9  # int(10 * (1 - 0.8)) is 1 in floating point, as in the released code
    wide = photo.resize((70, 40))
    [picture] = sd3.generate(PROMPT, image=wide, steps=2, progress=False)
    assert picture.size == (64, 32)
    with pytest.raises(ValueError, match="strength is 0"):
        sd3.generate(PROMPT, image=photo, strength=0)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_inpainting_keeps_what_is_not_masked(sd3: SD3, photo: Image.Image, sampler: Any) -> None:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))  # the left half is drawn anew
    generator = Generator().manual_seed(0)
    start = sd3.noise([generator], 64)
    known = sd3.encode_image(photo, (64, 64), [generator])

    def on_the_line(step: int, state: State) -> None:
        assert_close(state.latent[..., 4:], flow.interpolate(known, start, state.t)[..., 4:], rtol=0, atol=2e-4)
        assert (state.latent - flow.interpolate(known, start, state.t))[..., :4].abs().max() > 0.01

    [picture] = sd3.generate(PROMPT, image=photo, mask=mask, strength=1, sampler=sampler, callback=on_the_line, **SMALL)
    assert (array(picture)[:, 32:] == array(photo)[:, 32:]).all()
    assert np.abs(array(picture)[:, :32] - array(photo)[:, :32]).mean() > 5
    with pytest.raises(ValueError, match="a mask needs the image"):
        sd3.generate(PROMPT, mask=mask)


# --- control ----------------------------------------------------------------------------------------------------------------------


def test_a_hint_steers_and_its_strength_counts(sd3: SD3, photo: Image.Image) -> None:
    [plain] = sd3.generate(PROMPT, **SMALL)
    [off] = sd3.generate(PROMPT, control=photo, control_strength=0.0, **SMALL)
    [on] = sd3.generate(PROMPT, control=photo, **SMALL)
    [as_tensor] = sd3.generate(PROMPT, control=[pipeline.from_pil(photo, (64, 64))], control_strength=[1.0], slg=None, **SMALL)
    assert off == plain
    assert (array(on) != array(plain)).any()
    assert on == as_tensor
    sd3.generate(PROMPT, control=photo, control_end=0.5, slg=SkipLayers((1,), end=1.0), **SMALL)
    with pytest.raises(ValueError, match="2 hints for 1 ControlNets"):
        sd3.generate(PROMPT, control=[photo, photo], **SMALL)


def test_a_controlnet_of_another_base_is_refused(random_model: Path, tmp_path: Path) -> None:
    from minisd3 import weights
    from minisd3.config import ControlNetConfig
    from minisd3.controlnet import ControlNet

    weights.save_released(
        tmp_path / "other.safetensors", ControlNet(ControlNetConfig(depth=2, num_heads=4, head_dim=64, pooled_dim=224))
    )
    with pytest.raises(ValueError, match="does not fit its base"):
        load(random_model / "sd3_tiny.safetensors", controlnet=tmp_path / "other.safetensors", device="cpu")


def test_a_controlnet_is_found_by_path_name_or_hub_id(random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minisd3 import pipeline, weights

    net = weights.load_controlnet(random_model / "control.safetensors")
    (tmp_path / "tiny").mkdir()
    weights.save_released(tmp_path / "tiny" / "controlnet_blur.safetensors", net)
    weights.save_diffusers(tmp_path / "hub", net)
    monkeypatch.setattr(pipeline, "MODELS", tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / name.split("/")[1]))
    for name in ("blur", "owner/hub", random_model / "control.safetensors"):
        assert load(random_model / "sd3_tiny.safetensors", controlnet=name, device="cpu").controlnets[0].config == net.config
    for name, says in (("canny", "no ControlNet 'canny'"), ("owner/tiny", "owner/tiny has no config.json")):
        with pytest.raises(FileNotFoundError, match=says):
            load(random_model / "sd3_tiny.safetensors", controlnet=name, device="cpu")


# --- watching and stopping --------------------------------------------------------------------------------------------------------


def test_a_callback_sees_each_state_and_can_stop(sd3: SD3) -> None:
    seen: list[tuple[int, State]] = []
    sd3.generate(PROMPT, size=64, steps=4, progress=False, callback=lambda step, state: seen.append((step, state)))
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert seen[-1][1].t == 0
    assert_close(seen[-1][1].x0, seen[-1][1].latent)

    [early] = sd3.generate(PROMPT, size=64, steps=4, progress=False, callback=lambda step, state: step == 2)
    assert (array(early) == array(sd3.decode(seen[1][1].x0)[0])).all()


def test_an_interruption_keeps_the_last_state(sd3: SD3) -> None:
    def interrupt(step: int, state: State) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        sd3.generate(PROMPT, callback=interrupt, **SMALL)
    assert "sd3.decode(sd3.last_state.x0)" in stopped.value.__notes__[0]
    assert sd3.last_state is not None
    assert sd3.last_state.t == flow.sd3_schedule(3, 1.0)[2]
    assert sd3.decode(sd3.last_state.x0)[0].size == (64, 64)


def test_too_little_memory_ends_in_a_hint(sd3: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(MMDiT, "forward", full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        sd3.generate(PROMPT, **SMALL)
    for option in ("low_memory=True", "tiled=True", "smaller size", "fewer pictures"):
        assert option in error.value.__notes__[0]


def test_progress_is_shown_when_asked_for(sd3: SD3, capsys: pytest.CaptureFixture[str]) -> None:
    sd3.generate(PROMPT, **SMALL)
    assert capsys.readouterr().err == ""
    sd3.generate(PROMPT, size=64, steps=3)
    assert "3/3" in capsys.readouterr().err


# --- sample -----------------------------------------------------------------------------------------------------------------------


def test_sample_makes_what_generate_makes(sd3: SD3) -> None:
    [picture] = sd3.generate(PROMPT, seed=2, **SMALL)
    cond, uncond = sd3.encode_prompt(PROMPT)
    states = list(sd3.sample(noise(2), cond, uncond, steps=3))
    assert len(states) == 3
    assert not states[-1].requires_grad
    assert (array(sd3.decode(states[-1])[0]) == array(picture)).all()
    plain = list(sd3.sample(noise(2), cond, steps=3))[-1]
    assert_close(plain, list(sd3.sample(noise(2), cond, uncond, steps=3, cfg=1.0))[-1])
    with pytest.raises(ValueError, match="cfg is 3.0, which needs uncond"):
        sd3.sample(noise(2), cond, cfg=3.0)


def test_equal_prompts_are_encoded_once(sd3: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    encode = sd3.text.encode

    def noted(prompts: list[str]) -> Any:
        asked.append(prompts)
        return encode(prompts)

    monkeypatch.setattr(sd3.text, "encode", noted)
    cond, uncond = sd3.encode_prompt([PROMPT, OTHER, PROMPT])
    assert asked == [[PROMPT, OTHER, ""]]
    assert cond.context.shape == uncond.context.shape == (3, 40, 256)
    assert_close(cond.context[0], cond.context[2])


# --- load -------------------------------------------------------------------------------------------------------------------------


def test_low_memory_brings_each_part_back(sd3: SD3) -> None:
    sd3 = SD3(sd3.preset, sd3.mmdit, sd3.vae, sd3.text, device=torch.device("meta"), low_memory=True)
    before = {name: (p, p.clone()) for name, p in sd3.mmdit.state_dict().items()}
    with sd3._present(sd3.mmdit):
        assert {p.device.type for p in sd3.mmdit.state_dict().values()} == {"meta"}
    for name, tensor in sd3.mmdit.state_dict().items():
        assert tensor.data_ptr() == before[name][0].data_ptr()  # not a copy: the same memory
        assert_close(tensor, before[name][1], rtol=0, atol=0)


def test_number_types_and_devices(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(random_model / "sd3_tiny.safetensors", dtype=torch.bfloat16, device="cpu")
    assert model.mmdit.context_embedder.weight.dtype == model.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    assert model.generate(PROMPT, **SMALL)[0].size == (64, 64)
    assert latent(model).dtype == torch.float32
    assert pipeline.best_dtype(torch.device("cpu")) == torch.float32
    assert pipeline.best_dtype(torch.device("mps")) == torch.float16
    for able, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        assert pipeline.best_dtype(torch.device("cuda")) == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pipeline.best_device() == torch.device("cuda")


def test_text_encoders_may_lie_beside_the_file_or_anywhere(random_model: Path, tmp_path: Path) -> None:
    shutil.copy(random_model / "sd3_tiny.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="clip_l"):
        load(tmp_path / "model.safetensors", device="cpu")
    assert load(tmp_path / "model.safetensors", text_encoders=random_model / "text_encoders", device="cpu").text.t5 is not None
    shutil.copytree(random_model / "text_encoders", tmp_path, dirs_exist_ok=True)
    (tmp_path / "t5.safetensors").unlink()
    with pytest.raises(ValueError, match=r"without=\['t5'\]"):
        load(tmp_path / "model.safetensors", device="cpu")
    bare = load(tmp_path / "model.safetensors", without=["t5"], device="cpu")
    assert bare.encode_prompt(PROMPT)[0].context.shape == (1, 20, 256)


def test_presets_are_found_by_the_transformer(sd3: SD3) -> None:
    assert sd3.preset == PRESETS["tiny"]
    large = PRESETS["sd3.5-large"].mmdit
    assert pipeline.find_preset(large, "sd3.5_large.safetensors") is PRESETS["sd3.5-large"]
    assert pipeline.find_preset(large, "sd3.5_large_turbo.safetensors") is PRESETS["sd3.5-large-turbo"]
    deeper = pipeline.replace(PRESETS["tiny"].mmdit, depth=8)
    assert pipeline.find_preset(deeper, "x").mmdit == deeper
    assert pipeline.find_preset(deeper, "x").text == PRESETS["tiny"].text
    with pytest.raises(ValueError, match="context_dim 7 and pooled_dim 224"):
        pipeline.find_preset(pipeline.replace(deeper, context_dim=7), "x")


def hub_error(kind: type[Exception], status: int) -> Exception:
    import httpx2

    return kind("no entry", response=httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co")))  # type: ignore[call-arg]


def hub_errors() -> Iterator[tuple[Any, type[Exception], str]]:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    yield (
        hub_error(GatedRepoError, 403),
        PermissionError,
        "accept its licence: do so on https://huggingface.co/a/b, then log in with `hf auth login`",
    )
    yield hub_error(RepositoryNotFoundError, 401), FileNotFoundError, "the hub has no a/b, or shows it only to some.*HF_TOKEN"
    yield LocalEntryNotFoundError("cannot find"), ConnectionError, "a/b is not on this machine, and the hub cannot be reached"


@pytest.mark.parametrize("number", range(3))
def test_what_to_do_when_the_hub_says_no(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    error, kind, message = list(hub_errors())[number]

    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(kind, match=message) as raised:
        load("a/b")
    assert "\n" not in str(raised.value)


def test_a_hub_id_is_downloaded_without_what_is_not_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **named: asked.update(named, name=name) or str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="owner/name has no transformer, so it is not in diffusers' layout; download its .safetensors"
    ):
        load("owner/name")
    assert asked.pop("name") == "owner/name"
    files = ["model_index.json", "sd3.5_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors", "text_encoder/model.fp16.safetensors",
             "text_encoder/model.safetensors", "transformer/config.json", "tokenizer_3/spiece.model", "README.md"]  # fmt: skip
    kept = ["model_index.json", "text_encoder/model.safetensors", "transformer/config.json", "tokenizer_3/spiece.model"]
    assert list(filter_repo_objects(files, **asked)) == kept


def test_names_that_are_nowhere() -> None:
    with pytest.raises(
        FileNotFoundError, match="does not come with this package; load its hub id 'stabilityai/stable-diffusion-3.5-medium'"
    ):
        load("sd3.5-medium")
    with pytest.raises(FileNotFoundError, match="no file, folder or preset 'sd35'; give a path, .* or one of tiny, sd3-medium"):
        load("sd35")
    with pytest.raises(FileNotFoundError, match="models/missing.safetensors"):
        load("models/missing.safetensors")
    with pytest.raises(ConnectionError, match="not on this machine"):  # tests are offline
        load("nobody/nothing")
