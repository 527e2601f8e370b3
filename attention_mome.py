"""Attention, and which of its implementations a layer takes."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .kernels_mome import is_faster_as_matmul, masked_scores, matmul_attention_forward


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: (batch, heads, tokens, head_dim) → (batch, tokens, heads, head_dim) and the weights."""
    scores = masked_scores(query @ key.transpose(-1, -2) * scaling, attention_mask, is_causal)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attention_function(
    config: PreTrainedConfig, query: torch.Tensor, keys: torch.Tensor, output_attentions: bool | None = False
) -> Callable:
    """What the config asks for: transformers' own by name, or `eager_attention_forward`, with the same arguments.

    In place of SDPA, which has no weights to give, a call that asks for them gets `eager_attention_forward`, and a CPU
    may get two matrix products, see `matmul_attention_forward`.
    """
    if config._attn_implementation == "sdpa" and output_attentions:
        return eager_attention_forward
    if config._attn_implementation == "sdpa" and is_faster_as_matmul(query, keys):
        return matmul_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)


__all__ = ["attention_function", "eager_attention_forward"]
