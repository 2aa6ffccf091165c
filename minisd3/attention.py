"""The one attention function of the transformer: every map that the notebooks show passes through this line."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head (Vaswani et al. 2017, eq. 1). q, k, v (B L N d) -> (B L N*d), without any mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B N L d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B L N*d)
