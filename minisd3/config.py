"""Every number that tells one model from another: frozen dataclasses, and the presets, which state only what differs.

The released numbers were read from Stability AI's sd3.5 inference code (sd3_infer.py: CONFIGS) and from the headers of the
released files; `tiny` is the family member that ships inside this package.
"""

from dataclasses import dataclass, field
from typing import Literal


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder. Defaults are the released one (83,819,683 parameters)."""

    width: int = 128  # channels of the first level
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # channels of each level, as multiples of width; one halving between levels
    latent_channels: int = 16
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    groups: int = 32  # of every group norm
    scale: float = 1.5305  # normalised latent = (latent - shift) * scale, so that its spread is near 1
    shift: float = 0.0609

    def __post_init__(self) -> None:
        require(self.blocks >= 1, f"VAEConfig.blocks is {self.blocks}; it must be at least 1")
        for m in self.multipliers:
            channels = self.width * m
            require(
                channels > 0 and channels % self.groups == 0,
                f"VAEConfig: a level of {channels} channels cannot be split into groups={self.groups}; "
                f"make width {self.width} a multiple of it or lower groups",
            )

    @property
    def factor(self) -> int:
        """Pixels a latent cell, along each side: 8 for the released VAE."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class MMDiTConfig:
    """The transformer. Width and heads follow from the depth, as in every released model: heads = depth, width = head_dim * depth."""

    depth: int = 24
    head_dim: int = 64
    patch_size: int = 2
    in_channels: int = 16
    pos_embed_max_size: int = 192  # patches a side of the stored position table
    context_dim: int = 4096
    pooled_dim: int = 2048
    mlp_ratio: float = 4
    qk_norm: Literal["rms", "layer"] | None = None
    dual_attention_layers: tuple[int, ...] = ()
    # the rest is offered by the released code and used by no released model
    block_norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    scale_mod_only: bool = False
    registers: int = 0
    dual_attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.depth >= 1, f"MMDiTConfig.depth is {self.depth}; it must be at least 1")
        require(self.hidden_size % 4 == 0, f"MMDiTConfig: width {self.hidden_size} (head_dim {self.head_dim} x depth {self.depth}) "
                "must be a multiple of 4, for the sines and cosines of two coordinates")  # fmt: skip
        require(self.qk_norm in (None, "rms", "layer"), f"MMDiTConfig.qk_norm is {self.qk_norm!r}; choose None, 'rms' or 'layer'")
        require(self.block_norm in ("layer", "rms"), f"MMDiTConfig.block_norm is {self.block_norm!r}; choose 'layer' or 'rms'")
        require(self.mlp in ("gelu", "swiglu"), f"MMDiTConfig.mlp is {self.mlp!r}; choose 'gelu' or 'swiglu'")
        require(self.registers >= 0, f"MMDiTConfig.registers is {self.registers}; it cannot be negative")
        require(0 <= self.dual_attention_dropout < 1,
                f"MMDiTConfig.dual_attention_dropout is {self.dual_attention_dropout}; it must be in [0, 1)")  # fmt: skip
        outside = [i for i in self.dual_attention_layers if not 0 <= i < self.depth]
        require(not outside, f"MMDiTConfig.dual_attention_layers names {outside}; the blocks are 0 to {self.depth - 1}")

    @property
    def hidden_size(self) -> int:
        return self.head_dim * self.depth

    @property
    def num_heads(self) -> int:
        return self.depth


@dataclass(frozen=True)
class ControlNetConfig:
    """A ControlNet. form "8b" leans on its base for the picture's tokens, form "2b" has a patch embedder of its own."""

    depth: int = 19
    num_heads: int = 38
    head_dim: int = 64
    patch_size: int = 2
    in_channels: int = 16
    pooled_dim: int = 2048  # 8b: the pooled text (2048); 2b: the base's embedded text, as wide as the base
    form: Literal["8b", "2b"] = "8b"
    mlp_ratio: float = 4

    def __post_init__(self) -> None:
        require(self.form in ("8b", "2b"), f"ControlNetConfig.form is {self.form!r}; choose '8b' or '2b'")
        require(self.depth >= 1, f"ControlNetConfig.depth is {self.depth}; it must be at least 1")

    @property
    def hidden_size(self) -> int:
        return self.head_dim * self.num_heads


@dataclass(frozen=True)
class CLIPConfig:
    """One CLIP text tower, in the words of transformers' CLIPTextConfig."""

    width: int
    layers: int
    heads: int
    activation: Literal["quick_gelu", "gelu"]
    pad: Literal["eos", "zero"]  # what fills up short prompts: the end token (CLIP-L) or token 0, "!" (CLIP-G)
    project: bool  # whether the pooled vector goes through text_projection
    vocab: int = 49408

    def __post_init__(self) -> None:
        require(self.width % self.heads == 0, f"CLIPConfig: width {self.width} is not a multiple of heads {self.heads}")
        require(self.layers >= 2, f"CLIPConfig.layers is {self.layers}; SD3 reads the last layer but one, so at least 2 are needed")


@dataclass(frozen=True)
class T5Config:
    """The T5 v1.1 encoder, in the words of transformers' T5Config."""

    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    hidden: int = 10240
    vocab: int = 32128


@dataclass(frozen=True)
class TextConfig:
    """The three text encoders and how long their token sequences are."""

    clip_l: CLIPConfig = CLIPConfig(768, 12, 12, "quick_gelu", "eos", project=False)
    clip_g: CLIPConfig = CLIPConfig(1280, 32, 20, "gelu", "zero", project=True)
    t5: T5Config = T5Config()
    clip_length: int = 77  # tokens of each CLIP, start and end tokens included
    t5_length: int = 77  # diffusers takes 256
    t5_characters: int | None = 226  # the released code cuts T5's text here, before it tokenises; diffusers: None
    t5_limit: int | None = None  # most tokens that T5 may have; the released code sets no limit, diffusers t5_length
    without_t5: Literal["omit", "zeros"] = "omit"  # in place of T5's tokens if there is no T5: nothing (ComfyUI), zeros (diffusers)

    def __post_init__(self) -> None:
        require(
            self.clip_l.width + self.clip_g.width <= self.t5.width,
            f"TextConfig: the two CLIPs side by side are {self.clip_l.width} + {self.clip_g.width} wide, more than T5's {self.t5.width}",
        )
        require(self.without_t5 in ("omit", "zeros"), f"TextConfig.without_t5 is {self.without_t5!r}; choose 'omit' or 'zeros'")

    @property
    def context_dim(self) -> int:
        return self.t5.width

    @property
    def pooled_dim(self) -> int:
        return self.clip_l.width + self.clip_g.width


@dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance: which blocks the third pass leaves out, how strongly, and during which part of the steps."""

    layers: tuple[int, ...]
    scale: float = 2.5
    start: float = 0.01  # fractions of all steps; step i (from 0) is guided if start * steps < i < end * steps
    end: float = 0.20

    def __post_init__(self) -> None:
        require(len(self.layers) > 0, "SkipLayers.layers is empty; name at least one block")
        require(0 <= self.start < self.end <= 1, f"SkipLayers: start {self.start} and end {self.end} must satisfy 0 <= start < end <= 1")


SamplerName = Literal["euler", "heun", "dpmpp_2m"]


@dataclass(frozen=True)
class Preset:
    """A whole model and the settings it is sampled with when nothing else is asked for."""

    mmdit: MMDiTConfig
    vae: VAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    controlnet: ControlNetConfig | None = None
    steps: int = 28
    cfg: float = 5.0
    sampler: SamplerName = "euler"
    shift: float = 3.0
    slg: SkipLayers | None = None
    slg_cfg: float | None = None  # the CFG scale to use together with slg, where it differs
    with_control: tuple[int, float, SamplerName] | None = (60, 3.5, "euler")  # steps, cfg and sampler with a ControlNet, where they differ
    size: tuple[int, int] = field(default=(1024, 1024))  # height, width in pixels

    @property
    def multiple(self) -> int:
        """Height and width of a picture must be multiples of this: 16 for the released models."""
        return self.vae.factor * self.mmdit.patch_size


_LARGE = MMDiTConfig(depth=38, qk_norm="rms")

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        mmdit=MMDiTConfig(depth=6, head_dim=32, pos_embed_max_size=24, context_dim=256, pooled_dim=224, qk_norm="rms",
                          dual_attention_layers=(0, 1, 2)),
        vae=VAEConfig(width=16, multipliers=(1, 2, 4, 8), blocks=1, groups=8, scale=0.5214, shift=-0.005),  # measured
        text=TextConfig(
            clip_l=CLIPConfig(96, 3, 3, "quick_gelu", "eos", project=False, vocab=1024),
            clip_g=CLIPConfig(128, 4, 4, "gelu", "zero", project=True, vocab=1024),
            t5=T5Config(width=256, layers=3, heads=4, head_dim=32, hidden=512, vocab=512),
            clip_length=20, t5_length=20,
        ),
        controlnet=ControlNetConfig(depth=3, num_heads=6, head_dim=32, pooled_dim=224),
        steps=20, cfg=4.0, sampler="dpmpp_2m", shift=1.0, slg=SkipLayers((3,), 1.5, 0.01, 0.5), with_control=None,
        size=(128, 128),
    ),
    "sd3-medium": Preset(mmdit=MMDiTConfig(depth=24)),
    "sd3.5-medium": Preset(
        mmdit=MMDiTConfig(depth=24, pos_embed_max_size=384, qk_norm="rms", dual_attention_layers=tuple(range(13))),
        steps=50, sampler="dpmpp_2m", slg=SkipLayers((7, 8, 9)), slg_cfg=4.0,
    ),
    "sd3.5-large": Preset(mmdit=_LARGE, controlnet=ControlNetConfig(), steps=40, cfg=4.5, sampler="dpmpp_2m"),
    "sd3.5-large-turbo": Preset(mmdit=_LARGE, controlnet=ControlNetConfig(), steps=4, cfg=1.0),
}  # fmt: skip
