"""What the passes and the models return, with the shape of every tensor."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .compatibility_mome import MomeCachedOutput


@dataclass
class MomeEncoderOutput(ModelOutput):
    """States of one pass through the trunk.

    Attributes:
        last_hidden_state: (batch, tokens, width), after the final norm if there is one.
        key_values: per layer, keys and values (batch, heads, tokens, head_dim) of these tokens.
        hidden_states: (batch, tokens, width) before each layer and at the end.
        attentions: per layer, (batch, heads, tokens, keys).
        router_logits: per layer, (batch, tokens, experts) over the experts of each token's own group; `None` for a
            model without routers.
    """

    last_hidden_state: torch.Tensor | None = None
    key_values: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class MomeFeatures(BaseModelOutputWithPooling):
    """Features of one pass.

    As `BaseModelOutputWithPooling`, and `router_logits`: per layer, (batch, tokens, experts); `matching_logits`:
    (batch, 2), "no match" and "match", of a fused pass of a model with a matching head.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    matching_logits: torch.Tensor | None = None


@dataclass
class MomeOutput(ModelOutput):
    """Images and texts in one space.

    Attributes:
        loss: contrastive loss plus router losses, with `return_loss=True`.
        logits_per_image: (images, texts), cosine times inverse temperature.
        logits_per_text: its transpose.
        text_embeds: (texts, projection_dim), L2-normalised.
        image_embeds: (images, projection_dim), L2-normalised.
        last_hidden_state, hidden_states, attentions: those of the only pass, when one modality was given.
        router_logits: per layer, a dict from group to logits (batch, tokens, experts).
        image_model_output, text_model_output: the passes one by one.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[dict[str, torch.Tensor], ...] | None = None
    image_model_output: MomeFeatures | None = None
    text_model_output: MomeFeatures | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class MomeCaptionOutput(MomeCachedOutput):
    """Captions of images.

    Attributes:
        loss: weighted sum of contrastive, caption and router losses, with `labels`.
        logits: (batch, tokens, vocabulary), next-token logits in line with `input_ids`.
        cache: keys and values of the image and the caption (`past_key_values` before transformers 5.24).
        hidden_states: (batch, tokens, width) before each layer and at the end, image tokens first.
        attentions: per layer, (batch, heads, tokens, keys).
        router_logits: per layer, a dict from group to logits (batch, tokens, experts).
        contrastive_loss, caption_loss: the parts of `loss`, unweighted.
        image_embeds: (images, projection_dim), L2-normalised, where images went through this call.
    """

    router_logits: tuple[dict[str, torch.Tensor], ...] | None = None
    contrastive_loss: torch.Tensor | None = None
    caption_loss: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None


__all__ = ["MomeCaptionOutput", "MomeEncoderOutput", "MomeFeatures", "MomeOutput"]
