"""Heads: what is made of the states that leave the trunk.

- `MomeFirstToken`, `MomeLastToken`, `MomeAttentionPooling` (`image_pooling`, `text_pooling`): what stands for
  a whole image or text;
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


class MomeFirstToken(nn.Module):
    """(batch, tokens, width) → (batch, width): `[CLS]` or `[BOS]`, the first token that is no padding."""

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if attention_mask is None:
            return states[:, 0]
        return _state_at(states, attention_mask.long().argmax(dim=1))


class MomeLastToken(nn.Module):
    """(batch, tokens, width) → (batch, width): the last token that is no padding."""

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if attention_mask is None:
            return states[:, -1]
        return _state_at(states, states.shape[1] - 1 - attention_mask.long().flip(1).argmax(dim=1))


def _state_at(states: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(states.shape[0], device=states.device), position]


class MomeAttentionPooling(nn.Module):
    """A learned probe looks at all tokens: o = attention(probe, states), then o + mlp(norm(o)).

    The head of SigLIP's image tower (2303.15343; `MAPHead` of big_vision `models/vit.py`): (batch, tokens, width) →
    (batch, width).
    """

    def __init__(self, config: MomeConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.query = MomeLinear(width, width)
        self.key_value = MomeLinear(width, 2 * width)
        self.output = MomeLinear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up_proj = MomeLinear(width, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = MomeLinear(config.intermediate_size, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = states.shape
        # (1, 1, width) → (batch, heads, 1, head_dim); (batch, tokens, 2 width) → 2 × (batch, heads, tokens, head_dim)
        query = self.query(self.probe.repeat(1, 2, 1))[:, :1]  # of a single row, the last bit depends on its address
        query = query.view(1, 1, self.heads, -1).transpose(1, 2).expand(batch, -1, -1, -1)
        key, value = self.key_value(states).view(batch, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        pooled = F.scaled_dot_product_attention(query, key, value)
        pooled = self.output(pooled.transpose(1, 2).reshape(batch, width))
        return pooled + self.down_proj(self.act_fn(self.up_proj(self.norm(pooled))))


def image_pooling(config: MomeConfig) -> nn.Module:
    return MomeAttentionPooling(config) if config.image_pooling == "attention" else MomeFirstToken()


def text_pooling(config: MomeConfig) -> nn.Module:
    return MomeLastToken() if config.text_pooling == "last" else MomeFirstToken()


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
