"""MMDiT and MMDiT-X: the transformer of SD3 and SD3.5, one model by configuration.

Two streams of tokens, text (`context`) and picture (`x`), each with weights of its own, meet in joint attention in every block;
time and pooled text reach every block as modulations (adaLN-zero). Esser et al. 2024, section 4 and figure 2; MMDiT-X adds a second
attention of the picture's tokens among themselves to the first blocks (Stable Diffusion 3.5 Medium).
Attribute names are those of the released files, under `model.diffusion_model.`.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minisd3.attention import attention
from minisd3.config import MMDiTConfig, require

# --- what enters: patches, positions, time, pooled text ---------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Cuts latents into patches, each one token: a linear map, written as a convolution whose stride is its size."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)  # (B C H W) -> (B L D), row by row
        return tokens.contiguous()  # or every sum in every block would inherit the transposed order, which norms must undo


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """The inverse of cutting into patches: (B L p*p*C), the channel fastest, -> (B C H W); height and width count patches."""
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=patch_size, q=patch_size)


def position_table(size: int, width: int) -> Tensor:
    """(1 size*size D) sines and cosines of the column, then of the row, of each patch. For new models only.

    The tables of released models are stored in their files and were not all made on the same grid, so a file's table is what counts.
    """
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(size, dtype=torch.float64)[:, None] * frequency  # (size D/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # (size D/2)
    columns, rows = line.repeat(size, 1), line.repeat_interleave(size, 0)  # (size*size D/2) each
    return torch.cat([columns, rows], dim=1).float()[None]


def timestep_embedding(t: Tensor, width: int = 256, max_period: float = 10000.0) -> Tensor:
    """(B,) times in [0, 1] -> (B width): all cosines, then all sines, of 1000 t at falling frequencies, in fp32.

    The only place where time is multiplied by 1000.
    """
    frequency = torch.exp(-torch.log(torch.tensor(max_period)) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angle = 1000 * t.float()[:, None] * frequency.to(t.device)  # (B width/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class VectorEmbedder(nn.Module):
    """Two linear layers with a SiLU between: (B P) -> (B D)."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.to(next(self.mlp.parameters()).dtype))


class TimestepEmbedder(VectorEmbedder):
    """Time (B,) in [0, 1] -> (B D)."""

    def __init__(self, width: int) -> None:
        super().__init__(256, width)

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(timestep_embedding(t))


# --- the parts of a block ---------------------------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """torch's, which under autocast, where its weight is fp32 and its input is not, warns and cannot use its fused form."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def norm(kind: str, width: int, *, affine: bool) -> nn.Module:
    """A layer norm or an RMS norm over the last axis, as the released code sets them up (eps 1e-6)."""
    return {"layer": nn.LayerNorm, "rms": RMSNorm}[kind](width, eps=1e-6, elementwise_affine=affine)


class MLP(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) without biases, two thirds as wide inside so that it costs what MLP costs (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = -(-(2 * hidden // 3) // 256) * 256  # rounded up to a multiple of 256
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class QKV(NamedTuple):
    """Queries, keys and values, each (B L N d)."""

    q: Tensor
    k: Tensor
    v: Tensor


class AttentionInput(nn.Module):
    """Tokens (B L D) -> queries, keys and values by head, queries and keys normalised if asked for (QK norm)."""

    def __init__(self, width: int, heads: int, qk_norm: str | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q, self.ln_k = (norm(qk_norm, width // heads, affine=True) if qk_norm else nn.Identity() for _ in range(2))

    def project(self, x: Tensor) -> QKV:
        q, k, v = rearrange(self.qkv(x), "b l (three n d) -> b l three n d", three=3, n=self.heads).unbind(2)
        return QKV(self.ln_q(q), self.ln_k(k), v)


class SelfAttention(AttentionInput):
    """AttentionInput and the projection of what was attended to."""

    def __init__(self, width: int, heads: int, qk_norm: str | None) -> None:
        super().__init__(width, heads, qk_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*self.project(x)))


class Modulation(nn.Sequential):
    """The vector c (B D) -> n tensors (B 1 D) that shift, scale and gate a block (adaLN, Peebles & Xie 2023, section 3.2)."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, n * width))
        self.n = n

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return super().forward(c).unsqueeze(1).chunk(self.n, dim=2)


class ScaleModulation(Modulation):
    """The variant without shifts: for (shift, scale, gate, ...) it makes (scale, gate, ...), and every shift is 0."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__(width, {6: 4, 2: 1}[n])

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        made = super().forward(c)
        zero = torch.zeros_like(made[0])
        return (zero, *made[:2], zero, *made[2:]) if len(made) == 4 else (zero, *made)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B L D) stretched and moved, every token alike: shift and scale (B 1 D)."""
    return x * (1 + scale) + shift


# --- blocks -----------------------------------------------------------------------------------------------------------------------


class BlockInput(nn.Module):
    """How every block begins: a modulated norm, then queries, keys and values."""

    modulations: int

    def __init__(self, config: MMDiTConfig, attn: AttentionInput) -> None:
        super().__init__()
        self.norm1 = norm(config.block_norm, config.hidden_size, affine=False)
        self.attn = attn
        self.adaLN_modulation = (ScaleModulation if config.scale_mod_only else Modulation)(config.hidden_size, self.modulations)

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """c (B D) -> shift, scale, gate, shift, scale, gate, ... (B 1 D), in the order of the released files."""
        return self.adaLN_modulation(c)

    def pre_attention(self, x: Tensor, m: tuple[Tensor, ...]) -> QKV:
        return self.attn.project(modulate(self.norm1(x), m[0], m[1]))


class Block(BlockInput):
    """A transformer block of one stream with 6 modulations: shift, scale, gate for the attention, then for the MLP.

    Cut into three methods so that two streams can meet between pre_attention and post_attention. Its own `forward` attends to
    itself, and is the ControlNet's block.
    """

    modulations = 6
    attn: SelfAttention

    def __init__(self, config: MMDiTConfig) -> None:
        width = config.hidden_size
        super().__init__(config, SelfAttention(width, config.num_heads, config.qk_norm))
        self.norm2 = norm(config.block_norm, width, affine=False)
        self.mlp = {"gelu": MLP, "swiglu": SwiGLU}[config.mlp](width, int(width * config.mlp_ratio))

    def post_attention(self, x: Tensor, attended: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        return self.feed_forward(self.add_attention(x, attended, m), m)

    def add_attention(self, x: Tensor, attended: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        return x + m[2] * self.attn.proj(attended)

    def feed_forward(self, x: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        return x + m[5] * self.mlp(modulate(self.norm2(x), m[3], m[4]))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        m = self.modulation(c)
        return self.post_attention(x, attention(*self.pre_attention(x, m)), m)


class DualAttentionBlock(Block):
    """MMDiT-X's picture block with 9 modulations: a second attention, among the picture's tokens only, beside the joint one."""

    modulations = 9

    def __init__(self, config: MMDiTConfig) -> None:
        require(not config.scale_mod_only, "scale_mod_only has no form with dual attention; set dual_attention_layers=()")
        super().__init__(config)
        self.attn2 = SelfAttention(config.hidden_size, config.num_heads, config.qk_norm)
        self.dropout = config.dual_attention_dropout

    def add_attention(self, x: Tensor, attended: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        own = m[8] * self.attn2(modulate(self.norm1(x), m[6], m[7]))  # from the same x as the joint attention
        joint = m[2] * self.attn.proj(attended)
        if self.training and self.dropout:  # for whole samples, and without rescaling, as in the released code
            joint = joint * torch.empty(len(x), 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - self.dropout)
        return x + joint + own


class FinalContextBlock(BlockInput):
    """The text's side of the last block with 2 modulations: nothing reads the text afterwards, so it only gives keys and values."""

    modulations = 2

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config, AttentionInput(config.hidden_size, config.num_heads, config.qk_norm))

    def post_attention(self, x: Tensor, attended: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        return x  # the text is left as it is, and never read again


class JointBlock(nn.Module):
    """Text and picture side by side: own weights, one attention over both (Esser et al. 2024, figure 2b)."""

    def __init__(self, context_block: Block | FinalContextBlock, x_block: Block) -> None:
        super().__init__()
        self.context_block = context_block
        self.x_block = x_block

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """context (B L' D), x (B L D), c (B D) -> both streams, changed."""
        m_context, m_x = self.context_block.modulation(c), self.x_block.modulation(c)
        attended = attention(*self.join(context, x, m_context, m_x))  # (B L'+L D)
        text, picture = attended.split([context.shape[1], x.shape[1]], dim=1)
        return self.context_block.post_attention(context, text, m_context), self.x_block.post_attention(x, picture, m_x)

    def join(self, context: Tensor, x: Tensor, m_context: tuple[Tensor, ...], m_x: tuple[Tensor, ...]) -> QKV:
        """Both streams' queries, keys and values (B L'+L N d), the text's first. What they were joined from ends here, to save memory."""
        text, picture = self.context_block.pre_attention(context, m_context), self.x_block.pre_attention(x, m_x)
        return QKV(*(torch.cat(pair, dim=1) for pair in zip(text, picture, strict=True)))


class FinalLayer(nn.Module):
    """The last norm, modulated by shift and scale, and the map from tokens to patches: (B L D) -> (B L p*p*C)."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = norm(config.block_norm, width, affine=False)
        self.linear = nn.Linear(width, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = (ScaleModulation if config.scale_mod_only else Modulation)(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c)))


# --- the whole --------------------------------------------------------------------------------------------------------------------


class MMDiT(nn.Module):
    """The network: noisy latents, time and text -> velocity. See MMDiTConfig for its shapes and variants.

    Set `checkpointing` to True to trade a second forward pass for activations while training.
    """

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, last = config.hidden_size, config.depth - 1
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, width)
        self.register_buffer("pos_embed", position_table(config.pos_embed_max_size, width))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = VectorEmbedder(config.pooled_dim, width)
        self.context_embedder = nn.Linear(config.context_dim, width)
        if config.registers:
            self.register = nn.Parameter(torch.empty(1, config.registers, width))
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                FinalContextBlock(config) if i == last else Block(config),
                DualAttentionBlock(config) if i in config.dual_attention_layers else Block(config),
            )
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(config)
        self.checkpointing = False
        initialize(self)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        *,
        control: Sequence[Tensor] | None = None,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """Velocity at time t, like x.

        x (B C H W): latents; H and W multiples of the patch size, at most as many patches a side as the position table has
        t (B,) or scalar, in [0, 1]: 0 is data, 1 is noise
        context (B L' context_dim), pooled (B pooled_dim): what the text encoders made of the prompt
        control: a ControlNet's residuals (B L D), each added after depth / len(control) blocks in a row
        skip_layers: blocks to leave out, their residuals too (mmditx.py: forward_core_with_concat)
        """
        stream = self.embed(x, t, context, pooled)
        stream = self.run(stream, range(self.config.depth), skip_layers, control)
        return self.final(stream, x)

    def forward_branched(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        *,
        skip_layers: Collection[int],
        rows: int,
        control: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The velocity of the batch, and that of its first `rows` samples without skip_layers.

        Up to the first skipped block the two are the same, and computed once; from there on the copies run by themselves. `control`
        is added to the originals only, so with it the two part at once.
        """
        fork = min(skip_layers) if control is None else 0
        rest = range(fork, self.config.depth)
        stream = self.run(self.embed(x, t, context, pooled), range(fork))
        copies = Stream(*(part[:rows] for part in stream))
        v_skipped = self.final(self.run(copies, rest, skip_layers), x[:rows])
        return self.final(self.run(stream, rest, control=control), x), v_skipped

    def embed(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> "Stream":
        """The three things that every block works on; shapes as in `forward`."""
        c, dtype = self.config, self.context_embedder.weight.dtype
        require(
            x.ndim == 4 and x.shape[1] == c.in_channels and x.shape[2] % c.patch_size == 0 and x.shape[3] % c.patch_size == 0,
            f"x is {tuple(x.shape)}; MMDiT takes latents (B {c.in_channels} H W) with H and W multiples of {c.patch_size}",
        )
        require(
            context.ndim == 3 and context.shape[2] == c.context_dim and pooled.shape[1:] == (c.pooled_dim,),
            f"context is {tuple(context.shape)} and pooled {tuple(pooled.shape)}; they must be (B L {c.context_dim}) and (B {c.pooled_dim})",
        )
        tokens = self.x_embedder(x.to(dtype)) + self.cropped_positions(x.shape[2] // c.patch_size, x.shape[3] // c.patch_size).to(dtype)
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        vector = self.t_embedder(t) + self.y_embedder(pooled)  # (B D)
        text = self.context_embedder(context.to(dtype))  # (B L' D)
        if c.registers:
            text = torch.cat([self.register.expand(len(x), -1, -1), text], dim=1)
        return Stream(text, tokens, vector)

    def cropped_positions(self, height: int, width: int) -> Tensor:
        """(1 L D): the middle of the position table, for a picture of height x width patches."""
        size = self.config.pos_embed_max_size
        require(
            height <= size and width <= size,
            f"{height} x {width} patches do not fit the position table of {size} x {size}; draw at most {size} patches a side",
        )
        top, left = (size - height) // 2, (size - width) // 2
        table = rearrange(self.pos_embed, "1 (h w) d -> 1 h w d", h=size)
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def run(
        self, stream: "Stream", blocks: Collection[int], skip_layers: Collection[int] = (), control: Sequence[Tensor] | None = None
    ) -> "Stream":
        """Send the streams through these blocks."""
        context, x, c = stream
        if control is not None:
            require(
                len(control) > 0 and self.config.depth % len(control) == 0,
                f"{len(control)} control residuals do not divide the {self.config.depth} blocks evenly; this ControlNet has another base",
            )
        for i in blocks:
            if i in skip_layers:
                continue
            block = self.joint_blocks[i]
            if self.checkpointing and torch.is_grad_enabled():
                context, x = checkpoint(block, context, x, c, use_reentrant=False)
            else:
                context, x = block(context, x, c)
            if control is not None:
                x = x + control[i * len(control) // self.config.depth]
        return Stream(context, x, c)

    def final(self, stream: "Stream", x: Tensor) -> Tensor:
        """The velocity, in the shape and number type of x (B C H W)."""
        p = self.config.patch_size
        tokens = self.final_layer(stream.x, stream.c)  # (B L p*p*C)
        return unpatchify(tokens, x.shape[2] // p, x.shape[3] // p, p).to(x.dtype)


class Stream(NamedTuple):
    """What travels through the blocks."""

    context: Tensor  # (B L' D)
    x: Tensor  # (B L D)
    c: Tensor  # (B D): time and pooled text, read by every modulation


def initialize(model: nn.Module) -> None:
    """The rules of a new model: Xavier for matrices, small normals for the embedders of vectors, zeros for what must start silent.

    With every gate and the last layer at zero, each block begins as the identity and the model predicts zero (adaLN-zero).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name == "register":
            nn.init.normal_(parameter, std=0.02)
