"""Learned routing inside a modality: which expert takes which token.

- `MomeRouter`: softmax over the experts of one group, top-k, in fp32;
- `run_experts`: what the experts make of it, in an exported graph too.

    hidden (tokens, width) ─ router ─ (tokens, k) expert ids and weights ─ `MomeExperts` ─ (tokens, width)

What keeps all experts in use is in `losses_mome.py`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .compatibility_mome import is_exporting
from .kernels_mome import all_experts_forward


class MomeRouter(nn.Module):
    """Chooses `experts_per_token` of the experts of one group for each of its tokens.

    A router only knows the experts of its own group, so that the softmax over its logits is the group-masked
    softmax over all experts: p = softmax(logits), top-k, renormalised if k > 1. With k = 1 the raw p is kept, or
    the router would get no gradient (Switch, 2101.03961).

    It is no `nn.Linear`: what adapts or quantises the linear layers of a model expects one tensor of each.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.experts_per_group, config.hidden_size))
        self.experts_per_token = config.experts_per_token

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_states (tokens, width) → logits (tokens, experts) fp32, weights and expert ids (tokens, k)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
        top_k_weights, top_k_index = logits.softmax(dim=-1).topk(self.experts_per_token, dim=-1)
        if self.experts_per_token > 1:
            top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return logits, top_k_weights.to(hidden_states.dtype), top_k_index


def run_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`experts(…)`; but an exported graph can't hold the operators of products whose bounds are data: `all_experts`.

    Arguments and result as those of `all_experts_forward`.
    """
    if is_exporting() and experts.config._experts_implementation in (None, "eager", "grouped_mm"):
        return all_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    return experts(hidden_states, top_k_index, top_k_weights)
