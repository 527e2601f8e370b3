"""Heads: what is made of the states that leave the trunk.

- `first_token`: the state that stands for a whole image or text;
- `MomeCaptionHead`: next-token logits;
- `MomeJointProjection` (`joint_projection`): embeddings of VLMo's second contrastive loss, whose upper layers ran
  through the joint experts, with a temperature of their own (`itc_vl_*` of unilm `vlmo/modules/vlmo_module.py`);
- `MomeMultimodalPooler` (`multimodal_pooler`): what VLMo's image–text matching head of a fused pass reads.

The projections of the first contrastive loss are linear layers of `MomeModel`.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_mome import MomeConfig
from .kernels_mome import MomeLinear


def first_token(states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, tokens, width) → (batch, width): `[CLS]` or `[BOS]`, the first token that is no padding."""
    if attention_mask is None:
        return states[:, 0]
    return states[torch.arange(states.shape[0], device=states.device), attention_mask.long().argmax(dim=1)]


class MomeCaptionHead(nn.Module):
    """States (batch, tokens, width) → logits (batch, tokens, vocabulary)."""

    def __init__(self, config: MomeConfig):
        super().__init__()
        self.transform = None
        if config.lm_head_transform:
            self.transform = nn.Sequential(
                MomeLinear(config.hidden_size, config.hidden_size),
                ACT2FN[config.hidden_act],
                nn.LayerNorm(config.hidden_size, eps=1e-12),
            )
        self.decoder = MomeLinear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.transform is not None:
            hidden_states = self.transform(hidden_states)
        return self.decoder(hidden_states)


class MomeJointProjection(nn.Module):
    """First tokens (batch, width) whose upper layers ran through the joint experts → (batch, projection_dim)."""

    def __init__(self, config: MomeConfig):
        super().__init__()
        self.image_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def image(self, states: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.image_projection(states), dim=-1)

    def text(self, states: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text_projection(states), dim=-1)


class MomeMultimodalPooler(nn.Module):
    """First token of the text in a fused pass (batch, width) → (batch, width), as BERT's pooler."""

    def __init__(self, config: MomeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.dense(states).tanh()
