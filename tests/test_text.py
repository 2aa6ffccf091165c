"""Text: SD3's rules on small random encoders, each against transformers or diffusers, and the full-size ones by name and shape."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

import minisd3
from minisd3.config import CLIPConfig, T5Config, TextConfig
from minisd3.formats import WeightsError
from minisd3.text import Prompts, Row, TextEncoders, TruncationWarning, clip_tower, first_tokens, read_clip, t5_tower, words

FACTS = Path(__file__).parent / "facts"
TOKENIZERS = Path(minisd3.__file__).parent / "models/tiny/text_encoders"
CONFIG = TextConfig(
    clip_l=CLIPConfig(16, 2, 2, "quick_gelu", "eos", project=False, vocab=1024),
    clip_g=CLIPConfig(24, 3, 2, "gelu", "zero", project=True, vocab=1024),
    t5=T5Config(width=48, layers=2, heads=2, head_dim=8, hidden=32, vocab=512),
    clip_length=12, t5_length=14,
)  # fmt: skip
END = 1023
PROMPT = "a red fish near the water"


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = TextEncoders(
            CONFIG,
            clip_l=clip_tower(CONFIG.clip_l, CONFIG.clip_length),
            clip_g=clip_tower(CONFIG.clip_g, CONFIG.clip_length),
            t5=t5_tower(CONFIG.t5),
            clip_tokenizer=CLIPTokenizer.from_pretrained(TOKENIZERS / "clip_tokenizer"),
            t5_tokenizer=T5Tokenizer.from_pretrained(TOKENIZERS / "t5_tokenizer"),
        )
        for p in made.parameters():  # fresh biases are 0 and fresh embeddings tiny, which would hide mistakes
            p.data.add_(torch.randn_like(p), alpha=0.2)
    return made


def changed(encoders: TextEncoders, **changes) -> TextEncoders:
    """The same encoders under another config, or without some."""
    towers = {name: changes.pop(name, getattr(encoders, name)) for name in ("clip_l", "clip_g", "t5")}
    config = replace(encoders.config, **changes)
    return TextEncoders(config, **towers, clip_tokenizer=encoders.clip_tokenizer, t5_tokenizer=encoders.t5_tokenizer)


def row(encoders: TextEncoders, name: str, prompt: str) -> Row:
    return getattr(encoders.tokenize(prompt), name)


def ids(encoders: TextEncoders, name: str, prompt: str) -> Tensor:
    return torch.tensor([row(encoders, name, prompt).ids])


# --- quirks 1 to 3: words, weights, the first 77 tokens ---------------------------------------------------------------------------


def test_words_are_cut_at_spaces_and_newlines() -> None:
    assert words("  a red\nfish,  big ") == ["a", "red", "fish,", "big"]
    assert words(" \n ") == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (red:1.3) fish", "a red fish"),
        ("a (red) fish", "a red fish"),
        ("a ((red fish:1.2) boat:0.5) car", "a red fish boat car"),
        ("a (red:high) fish", "a red:high fish"),  # not a number, so not a weight
        ("a (:1.3) fish", "a :1.3 fish"),  # nothing before the colon
        (r"a \(red\) fish", "a (red) fish"),
        (r"a (red \(big\):1.3) fish", "a red (big) fish"),
        ("a (red fish", "a (red fish"),
        ("a red) fish", "a red) fish"),
        ("red(fish:2)boat", "red fish boat"),
        ("() a", "a"),
    ],
)
def test_weights_are_parsed_and_dropped(prompt: str, expected: str) -> None:
    assert words(prompt) == expected.split()


def test_word_by_word_equals_all_at_once_for_plain_text(encoders: TextEncoders) -> None:
    assert encoders.clip_tokenizer is not None and encoders.t5_tokenizer is not None
    n = len(whole := encoders.clip_tokenizer(PROMPT).input_ids)
    assert row(encoders, "clip_l", PROMPT).ids[:n] == whole
    n = len(whole := encoders.t5_tokenizer(PROMPT).input_ids)
    assert row(encoders, "t5", PROMPT).ids[:n] == whole


def test_a_word_that_does_not_fit_ends_the_sequence_unless_it_is_long() -> None:
    short, long = [[1, 2], [3, 4, 5], [6]], [[1, 2], list(range(10, 18)), [6]]
    assert first_tokens(short, 6) == ([1, 2, 3, 4, 5, 6], 3)
    assert first_tokens(short, 4) == ([1, 2], 1)  # [6] would fit, but comes after
    assert first_tokens(long, 4) == ([1, 2, 10, 11], 1)
    assert first_tokens(long, 2) == ([1, 2], 1)


def test_clip_stops_at_a_word(encoders: TextEncoders) -> None:
    read = row(encoders, "clip_l", "a red fish to the right of a green elephant on the sand")  # 9 words, and room for 10 tokens
    assert "".join(read.pieces[1:-2]).split("</w>") == ["a", "red", "fish", "to", "the", "right", "of", "a", "green", ""]
    assert read.ids[-2:] == [END, END] and read.pads == [False] * 11 + [True]
    assert read.cut == ["elephant", "on", "the", "sand"]


# --- quirks 4 to 8: padding, layers, pooling, and how the three join ----------------------------------------------------------------


def test_each_clip_pads_in_its_way(encoders: TextEncoders) -> None:
    for name, pad in ("clip_l", END), ("clip_g", 0):
        read = row(encoders, name, PROMPT)
        assert read.ids[0] == END - 1 and read.ids[7] == END and read.ids[8:] == 4 * [pad]
        assert read.pads == 8 * [False] + 4 * [True]
    assert row(encoders, "clip_g", "").pieces[:3] == ["<|startoftext|>", "<|endoftext|>", "!"]


@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
def test_clip_is_causal_so_pads_change_only_themselves(encoders: TextEncoders, name: str) -> None:
    tower, config = getattr(encoders, name), getattr(CONFIG, name)
    other = ids(encoders, name, PROMPT)
    other[0, 8:] = 300
    with torch.no_grad():
        context, pooled = read_clip(tower, ids(encoders, name, PROMPT), project=config.project)
        context_other, pooled_other = read_clip(tower, other, project=config.project)
    torch.testing.assert_close(context[:, :8], context_other[:, :8])
    torch.testing.assert_close(pooled, pooled_other)
    assert (context[:, 8:] - context_other[:, 8:]).abs().amax(-1).min() > 0.01


def test_pads_are_read_by_clip_and_by_t5(encoders: TextEncoders) -> None:
    full, no_mask = encoders.encode([PROMPT]).context, ids(encoders, "t5", PROMPT)
    assert encoders.t5 is not None
    with torch.no_grad():
        masked = encoders.t5(no_mask, attention_mask=(no_mask != 0).long()).last_hidden_state
    assert (full[:, 12:19] - masked[:, :7]).abs().max() > 0.01
    assert full[:, 8:12].abs().amax(-1).min() > 0.1  # CLIP's states at pads are not blanked out


def test_clip_l_is_the_penultimate_layer_and_the_unprojected_end(encoders: TextEncoders) -> None:
    tower = encoders.clip_l
    assert tower is not None
    with torch.no_grad():
        out = tower.text_model(ids(encoders, "clip_l", PROMPT), output_hidden_states=True)
        again = tower.text_model.final_layer_norm(tower.text_model.encoder.layers[-1](out.hidden_states[-2], None, is_causal=True))
    torch.testing.assert_close(again, out.last_hidden_state)  # so [-2] is one layer and the norm before the end
    context, pooled = encoders.encode([PROMPT])
    torch.testing.assert_close(context[:, :12, :16], out.hidden_states[-2], rtol=0, atol=0)
    torch.testing.assert_close(pooled[:, :16], out.last_hidden_state[:, 7], rtol=0, atol=0)


def test_clip_g_is_the_penultimate_layer_and_the_projected_end(encoders: TextEncoders) -> None:
    assert encoders.clip_g is not None
    with torch.no_grad():
        out = encoders.clip_g(ids(encoders, "clip_g", PROMPT), output_hidden_states=True)
    context, pooled = encoders.encode([PROMPT])
    torch.testing.assert_close(context[:, :12, 16:40], out.hidden_states[-2], rtol=0, atol=0)
    torch.testing.assert_close(pooled[:, 16:], out.text_embeds, rtol=0, atol=0)


def test_how_the_three_join(encoders: TextEncoders) -> None:
    assert encoders.t5 is not None
    context, pooled = encoders.encode([PROMPT, ""])
    assert context.shape == (2, 12 + 14, 48) and pooled.shape == (2, 16 + 24)
    assert context.dtype == pooled.dtype == torch.float32
    assert not context[:, :12, 40:].any()  # zeros up to T5's width
    with torch.no_grad():
        t5 = encoders.t5(ids(encoders, "t5", PROMPT)).last_hidden_state
    torch.testing.assert_close(context[:1, 12:], t5)


def test_a_batch_equals_its_prompts_alone(encoders: TextEncoders) -> None:
    prompts = [PROMPT, "", "a blue boat at night"]
    together = encoders.encode(prompts)
    for i, prompt in enumerate(prompts):
        alone = encoders.encode([prompt])
        torch.testing.assert_close(together.context[i : i + 1], alone.context, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.pooled[i : i + 1], alone.pooled, rtol=1e-4, atol=1e-5)


def test_a_prompt_for_each_encoder(encoders: TextEncoders) -> None:
    context, pooled = encoders.encode([Prompts("a red fish", "a blue boat", "a tree")])
    plain = {prompt: encoders.encode([prompt]) for prompt in ("a red fish", "a blue boat", "a tree")}
    torch.testing.assert_close(context[:, :12, :16], plain["a red fish"].context[:, :12, :16])
    torch.testing.assert_close(context[:, :12, 16:], plain["a blue boat"].context[:, :12, 16:])
    torch.testing.assert_close(context[:, 12:], plain["a tree"].context[:, 12:])
    torch.testing.assert_close(pooled, torch.cat([plain["a red fish"].pooled[:, :16], plain["a blue boat"].pooled[:, 16:]], -1))


# --- quirks 9, 10, 12, 13: T5, absent encoders, warnings ----------------------------------------------------------------------------


def test_t5_ends_with_1_and_pads_with_0(encoders: TextEncoders) -> None:
    read = row(encoders, "t5", "a red fish")
    assert read.pieces == ["▁a", "▁red", "▁fish", "</s>", *10 * ["<pad>"]]
    assert read.ids[3:] == [1, *10 * [0]] and read.pads == 4 * [False] + 10 * [True]


def test_t5_reads_226_characters_and_runs_on_past_its_length(encoders: TextEncoders) -> None:
    read = row(encoders, "t5", "green " * 40)  # 226 characters: 37 words and "gree"
    assert len(read.ids) > CONFIG.t5_length and read.ids[-1] == 1 and not any(read.pads)
    assert read.pieces[:37] == 37 * ["▁green"] and "".join(read.pieces[37:]) == "▁gree</s>"
    assert read.cut == ["green", "green", "green"]
    with pytest.warns(TruncationWarning):
        context = encoders.encode(["green " * 40, "a red fish"]).context
    assert context.shape[1] == 12 + len(read.ids)


def test_t5_as_diffusers_cuts_it(encoders: TextEncoders) -> None:
    assert encoders.t5_tokenizer is not None
    like_diffusers = changed(encoders, t5_characters=None, t5_limit=14)
    prompt = "a red fish to the right of an elephant in the evening " * 6
    expected = encoders.t5_tokenizer(prompt, padding="max_length", max_length=14, truncation=True).input_ids
    assert row(like_diffusers, "t5", prompt).ids == expected
    assert row(like_diffusers, "t5", prompt).cut[0] == "elephant"  # cut in two


@pytest.mark.parametrize("without_t5", ["omit", "zeros"])
def test_without_t5(encoders: TextEncoders, without_t5: str) -> None:
    full, less = encoders.encode([PROMPT]), changed(encoders, t5=None, without_t5=without_t5).encode([PROMPT])
    torch.testing.assert_close(less.pooled, full.pooled)
    torch.testing.assert_close(less.context[:, :12], full.context[:, :12])
    assert less.context.shape == (1, 12 if without_t5 == "omit" else 26, 48)
    assert not less.context[:, 12:].any()


@pytest.mark.parametrize(("name", "span"), [("clip_l", slice(0, 16)), ("clip_g", slice(16, 40))])
def test_without_a_clip_there_are_zeros_in_its_place(encoders: TextEncoders, name: str, span: slice) -> None:
    full, less = encoders.encode([PROMPT]), changed(encoders, **{name: None}).encode([PROMPT])
    assert not less.context[:, :12, span].any() and not less.pooled[:, span].any()
    full.context[:, :12, span], full.pooled[:, span] = 0, 0
    torch.testing.assert_close(less.context, full.context)
    torch.testing.assert_close(less.pooled, full.pooled)
    assert getattr(changed(encoders, **{name: None}).tokenize(PROMPT), name) is None


def test_the_warning_names_the_words_by_encoder(encoders: TextEncoders) -> None:
    long = "a red fish to the right of a green car on the sand"
    with pytest.warns(TruncationWarning, match=r"CLIP-L leaves out 'on the sand'; CLIP-G leaves out 'on the sand'$"):
        encoders.encode([long])
    with pytest.warns(TruncationWarning, match=r"too long: T5 leaves out 'green green green'$"):
        encoders.encode([Prompts("", "", "green " * 40)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoders.encode([PROMPT])


# --- diffusers ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers_pipeline(encoders: TextEncoders) -> StableDiffusion3Pipeline:
    def tokenizer(pad: str) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(TOKENIZERS / "clip_tokenizer", model_max_length=CONFIG.clip_length, pad_token=pad)

    assert encoders.clip_l is not None
    clip_l = clip_tower(CONFIG.clip_l, CONFIG.clip_length)
    clip_l.load_state_dict({**encoders.clip_l.state_dict(), "text_projection.weight": torch.eye(16)})  # as diffusers converts it
    return StableDiffusion3Pipeline(
        transformer=None, scheduler=None, vae=None, text_encoder=clip_l, text_encoder_2=encoders.clip_g, text_encoder_3=encoders.t5,
        tokenizer=tokenizer("<|endoftext|>"), tokenizer_2=tokenizer("!"), tokenizer_3=encoders.t5_tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("prompts", [Prompts(PROMPT, PROMPT, PROMPT), Prompts("a boat", "at night, a big star", "a tree")])
def test_diffusers_encodes_the_same(encoders: TextEncoders, diffusers_pipeline: StableDiffusion3Pipeline, prompts: Prompts) -> None:
    with torch.no_grad():
        context, negative_context, pooled, negative_pooled = diffusers_pipeline.encode_prompt(
            *prompts, device="cpu", max_sequence_length=CONFIG.t5_length
        )
    ours = encoders.encode([prompts, ""])
    torch.testing.assert_close(ours.context, torch.cat([context, negative_context]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.pooled, torch.cat([pooled, negative_pooled]), rtol=1e-4, atol=1e-5)


# --- full size, files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("clip_l", "clip_l"), ("clip_g", "clip_g"), ("t5", "t5xxl")])
def test_the_released_names_and_shapes(name: str, file: str) -> None:
    config = TextConfig()
    with torch.device("meta"):
        tower = t5_tower(config.t5) if name == "t5" else clip_tower(getattr(config, name), config.clip_length)
    expected = json.loads((FACTS / f"{file}.keys.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in tower.state_dict().items()} == expected
    act = tower.config.dense_act_fn if name == "t5" else tower.config.hidden_act
    assert act == {"clip_l": "quick_gelu", "clip_g": "gelu", "t5": "gelu_new"}[name]  # gelu_new: the tanh form


def same(one: TextEncoders, other: TextEncoders) -> None:
    for a, b in zip(one.encode([PROMPT]), other.encode([PROMPT]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_saved_and_loaded(encoders: TextEncoders, tmp_path: Path) -> None:
    encoders.save(tmp_path)
    loaded = TextEncoders.load(tmp_path, CONFIG)
    same(encoders, loaded)
    assert loaded.t5 is not None and loaded.t5.shared.weight is loaded.t5.encoder.embed_tokens.weight
    assert "encoder.embed_tokens.weight" not in load_file(tmp_path / "t5.safetensors")
    without = TextEncoders.load(tmp_path, CONFIG, without=["clip_g", "t5"])
    assert without.clip_g is without.t5 is without.t5_tokenizer is None


@pytest.fixture
def released(encoders: TextEncoders, tmp_path: Path) -> Path:
    """A folder as the released files make it: no projection in CLIP-L, both names of T5's embedding."""
    encoders.save(tmp_path)
    clip_l, t5 = load_file(tmp_path / "clip_l.safetensors"), load_file(tmp_path / "t5.safetensors")
    del clip_l["text_projection.weight"]
    save_file(clip_l, tmp_path / "clip_l.safetensors")
    (tmp_path / "t5.safetensors").unlink()
    save_file({**t5, "encoder.embed_tokens.weight": t5["shared.weight"].clone()}, tmp_path / "t5xxl_fp16.safetensors")
    return tmp_path


def test_released_files(encoders: TextEncoders, released: Path) -> None:
    loaded = TextEncoders.load(released, CONFIG)
    same(encoders, loaded)
    assert loaded.clip_l is not None
    assert torch.equal(loaded.clip_l.text_projection.weight, torch.eye(16))


def test_diffusers_folders_with_a_sharded_t5(encoders: TextEncoders, tmp_path: Path) -> None:
    encoders.save(tmp_path)
    for name, folder in ("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"), ("t5", "text_encoder_3"):
        (tmp_path / folder).mkdir()
        (tmp_path / f"{name}.safetensors").rename(tmp_path / folder / "model.safetensors")
    (tmp_path / "clip_tokenizer").rename(tmp_path / "tokenizer")
    (tmp_path / "t5_tokenizer").rename(tmp_path / "tokenizer_3")
    whole = load_file(tmp_path / "text_encoder_3" / "model.safetensors")
    (tmp_path / "text_encoder_3" / "model.safetensors").unlink()
    names = sorted(whole)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save_file({name: whole[name] for name in part}, tmp_path / "text_encoder_3" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "text_encoder_3" / "model.safetensors.index.json").write_text(json.dumps(index))
    same(encoders, TextEncoders.load(tmp_path, CONFIG))


def test_dtypes(encoders: TextEncoders, released: Path) -> None:
    half = TextEncoders.load(released, CONFIG, dtype=torch.float16)
    assert half.clip_l is not None and half.clip_l.dtype == torch.float16
    assert half.t5 is not None and half.t5.dtype == torch.bfloat16  # float16 overflows in T5
    ours, full = half.encode([PROMPT]), encoders.encode([PROMPT])
    assert ours.context.dtype == ours.pooled.dtype == torch.float32
    torch.testing.assert_close(ours.pooled, full.pooled, rtol=0.02, atol=0.02)
    torch.testing.assert_close(ours.context, full.context, rtol=0.1, atol=0.1)


def test_t5_in_float8(encoders: TextEncoders, released: Path) -> None:
    t5 = load_file(released / "t5xxl_fp16.safetensors")
    (released / "t5xxl_fp16.safetensors").unlink()
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in t5.items()}, released / "t5xxl_fp8_e4m3fn.safetensors")
    eight = TextEncoders.load(released, CONFIG).t5
    assert eight is not None and eight.dtype == torch.bfloat16
    expected = t5["shared.weight"].to(torch.float8_e4m3fn).to(torch.bfloat16)
    torch.testing.assert_close(eight.shared.weight, expected, rtol=0, atol=0)


# --- what is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "empty list"),
        ("a red fish", r"write \['a red fish'\]"),
        (Prompts("a", "b", "c"), "takes a list"),
        ([3], "not 3"),
        ([Prompts("a", "b", None)], "not Prompts"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_prompt(encoders: TextEncoders, prompts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoders.encode(prompts)


def test_a_missing_file(released: Path) -> None:
    (released / "clip_g.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"neither clip_g\*\.safetensors nor a folder text_encoder_2.*without=\['clip_g'\]"):
        TextEncoders.load(released, CONFIG)
    with pytest.raises(ValueError, match="without names"):
        TextEncoders.load(released, CONFIG, without=["clip"])


def test_a_file_in_the_wrong_place(released: Path) -> None:
    (released / "clip_g.safetensors").write_bytes((released / "t5xxl_fp16.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="should hold a CLIP text encoder, but looks like: T5"):
        TextEncoders.load(released, CONFIG)


def test_a_file_of_another_size(released: Path) -> None:
    (released / "clip_g.safetensors").write_bytes((released / "clip_l.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"17 missing: text_model.*wrongly shaped: .*is \(16,\), not \(24,\)"):
        TextEncoders.load(released, CONFIG)


def test_missing_tokenizers(released: Path) -> None:
    (released / "clip_tokenizer").rename(released / "elsewhere")
    with pytest.raises(WeightsError, match=r"openai/clip-vit-large-patch14 cannot be fetched .* vocab.json and merges.txt into"):
        TextEncoders.load(released, CONFIG)
    (released / "clip_tokenizer").mkdir()
    with pytest.raises(WeightsError, match="clip_tokenizer lacks vocab.json and merges.txt"):
        TextEncoders.load(released, CONFIG)


def test_a_tokenizer_of_another_encoder(encoders: TextEncoders) -> None:
    released_vocabulary = replace(CONFIG, clip_l=replace(CONFIG.clip_l, vocab=49408))
    with pytest.raises(ValueError, match="clip_l needs a clip_tokenizer whose last token, 49407, is its end token; given: 1023"):
        TextEncoders(released_vocabulary, clip_l=encoders.clip_l, clip_tokenizer=encoders.clip_tokenizer)
    with pytest.raises(ValueError, match="at most 512 tokens; given: None"):
        TextEncoders(CONFIG, t5=encoders.t5)
    with pytest.raises(ValueError, match="at least one"):
        TextEncoders(CONFIG)
