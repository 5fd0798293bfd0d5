"""What the attention of a transformer says about its tokens: how much each of them receives."""

import torch
from timm.layers import Attention


def received_attention(attention: Attention, tokens: torch.Tensor, queries: slice = slice(None)) -> torch.Tensor:
    """The attention that each token receives, mean over heads and over some of the tokens that ask.

    timm's fused kernel never forms the matrix softmax(Q K^T / sqrt(d)), so that it is computed here once more.

    Args:
        attention: timm's layer.
        tokens: Its input, ``(N, T, C)``.
        queries: Those that ask; all, or for instance the class token, ``slice(1)``.

    Returns:
        Shares ``(N, T)`` whose sum is 1.
    """
    number, length, _ = tokens.shape
    projected = attention.qkv(tokens).reshape(number, length, 3, attention.num_heads, attention.head_dim)
    query, key, _ = projected.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query[:, :, queries]), attention.k_norm(key)
    return (attention.scale * query @ key.mT).softmax(-1).mean((1, 2))
