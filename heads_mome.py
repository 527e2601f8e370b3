"""Heads of VLMo that the other models do without; a config switches each of them on.

- `MomeJointProjection` (`joint_projection`): embeddings of the second contrastive loss, whose upper layers ran through
  the joint experts, with a temperature of their own (`itc_vl_*` of unilm `vlmo/modules/vlmo_module.py`);
- `MomeMultimodalPooler` (`multimodal_pooler`): what the image–text matching head of a fused pass reads.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_mome import MomeConfig


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
