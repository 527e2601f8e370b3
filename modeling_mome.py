"""MoME: one transformer for images and text whose feed-forwards are experts of a modality.

- one trunk: VLMo (2111.02358) and BEiT-3 (2208.10442) are two of its configurations;
- hard modality routing as contiguous slices, learned top-k routing inside a modality where the config asks for it;
- `MomeModel`: image, text and fused features, one embedding space, multi-positive contrastive loss;
- `MomeForConditionalGeneration`: captions through the stock `generate()`, the image encoded once.

    pixel_values ─ image embedding ─┐                     ┌─ first token ─ project ─ image_embeds ─┐
                                    ├─ N × (attention,    │                                        ├─ logits_per_image
    input_ids ──── text embedding ──┘   routed experts) ──┼─ first token ─ project ─ text_embeds ──┘
                                                          └─ lm_head ─ caption logits

Four passes go through the trunk:

    image     [CLS] patches               every token sees every token
    text      [BOS] words [EOS]           every token sees every token
    fused     image tokens, text tokens   every token sees every token
    caption   the image pass, then        a caption token sees the image and the caption up to itself:
              caption tokens                         image  caption
                                              w1     1 1 1  1 0 0
                                              w2     1 1 1  1 1 0
                                              w3     1 1 1  1 1 1

An image token never sees a caption, so that the caption pass takes keys and values from the image pass as they are.

Glossary of shapes: batch; tokens (image tokens: `[CLS]` and patches); width (`hidden_size`); heads; head_dim;
experts (of one group); layers.
"""

import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .captioning_mome import (
    CaptionContext,
    MomeCache,
    cached_image_tokens,
    extend_mask,
)
from .configuration_mome import MomeConfig
from .generation_mome import MomeGenerationMixin
from .guidance_mome import MomeGenerationConfig
from .heads_mome import MomeJointProjection, MomeMultimodalPooler
from .routing_mome import router_losses
from .trunk_mome import (
    MomeEncoder,
    MomeEncoderOutput,
    MomeImageEmbedding,
    MomeLinear,
    MomePreTrainedModel,
    MomeTextEmbedding,
)

# transformers lets a model choose its experts' implementation if its file says `@use_experts_implementation`: the
# decorated class is MomeExperts in trunk_mome.py.

# ---------------------------------------------------------------------------------------------------- losses


def same_caption(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(texts, tokens) → (texts, texts) bool: which texts of a batch are equal, padding aside."""
    if attention_mask is not None:
        input_ids = input_ids.masked_fill(attention_mask == 0, -1)
    return (input_ids[:, None, :] == input_ids[None, :, :]).all(dim=-1)


def contrastive_loss(logits_per_image: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Multi-positive InfoNCE, mean of both directions (UniCL, 2204.03610, eq. 2–4).

    With one positive per row it is the loss of CLIP. Several positives share the target mass equally, so that an
    equal caption in the batch is no false negative.

    Args:
        logits_per_image: (images, texts), cosine times inverse temperature.
        positives: (images, texts) bool, at least one per row and column.
    """
    logits = logits_per_image.float()
    targets = positives.to(logits.dtype)
    image_to_text = -(targets * logits.log_softmax(dim=1)).sum(dim=1) / targets.sum(dim=1)
    text_to_image = -(targets * logits.log_softmax(dim=0)).sum(dim=0) / targets.sum(dim=0)
    return (image_to_text.mean() + text_to_image.mean()) / 2


# ----------------------------------------------------------------------------------------------------- model


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


class MomeModel(MomePreTrainedModel):
    """Embeds images and texts in one space, alone or fused."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]
    # Whether the values of ids and masks are looked at: for a helpful error, and to leave out a mask that hides
    # nothing. A look waits for the device. A training loop over ids that it made itself may set it to False.
    looks_at_values = True

    def __init__(self, config: MomeConfig):
        super().__init__(config)
        self.image_embedding = MomeImageEmbedding(config)
        self.text_embedding = MomeTextEmbedding(config)
        self.encoder = MomeEncoder(config)
        self.image_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.joint_projection = MomeJointProjection(config) if config.joint_projection else None
        self.multimodal_pooler = MomeMultimodalPooler(config) if config.multimodal_pooler else None
        self.matching_head = nn.Linear(config.hidden_size, 2) if config.matching_head else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (MomeModel, MomeJointProjection)):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.text_embedding.word_embeddings = value

    # The passes.

    def image_pass(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        kept_patches: torch.Tensor | None = None,
        **kwargs,
    ) -> MomeEncoderOutput:
        """pixel_values (images, channels, height, width) → states (images, image tokens, width).

        With `kept_patches` (images, kept) int64, different places in the grid of each image, its tokens are `[CLS]`
        and those patches: training with patches left out (FLIP, 2212.00794). The places themselves are not checked.
        """
        self._check_pixel_values(pixel_values)
        if bool_masked_pos is not None:
            self._check_masked_patches(bool_masked_pos, pixel_values)
        if kept_patches is not None:
            self._check_kept_patches(kept_patches, pixel_values)
        position_bias = None
        if self.encoder.position_bias is not None:
            position_bias = self.encoder.position_bias.image(pixel_values.device, kept_patches)
        hidden_states = self.image_embedding(pixel_values, bool_masked_pos, kept_patches)
        spans = (("image", hidden_states.shape[1]),)
        return self.encoder(hidden_states, spans, None, position_bias, return_dict=True, **kwargs)

    def text_pass(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> MomeEncoderOutput:
        """input_ids (texts, tokens) → states (texts, tokens, width)."""
        self._check_input_ids(input_ids)
        position_ids = text_positions(input_ids, attention_mask)
        hidden_states = self._embed_text(input_ids, position_ids, attention_mask)
        position_bias = None
        if self.encoder.position_bias is not None:
            position_bias = self.encoder.position_bias.text(position_ids, position_ids)
        mask = self._text_mask(hidden_states, attention_mask)
        spans = (("text", hidden_states.shape[1]),)
        return self.encoder(hidden_states, spans, mask, position_bias, return_dict=True, **kwargs)

    def fused_pass(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> MomeEncoderOutput:
        """An image and a text each → states (batch, image tokens + text tokens, width), every token seeing all."""
        self._check_pixel_values(pixel_values)
        self._check_input_ids(input_ids)
        _check_pairs(pixel_values, input_ids)
        position_ids = text_positions(input_ids, attention_mask)
        image, text = self.image_embedding(pixel_values), self._embed_text(input_ids, position_ids, attention_mask)
        hidden_states = torch.cat([image, text.to(image.dtype)], dim=1)
        spans = (("image", image.shape[1]), ("text", text.shape[1]))
        position_bias = None
        if self.encoder.position_bias is not None:
            position_bias = self.encoder.position_bias.fused(position_ids)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (image.shape[1], 0), value=1)
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        return self.encoder(hidden_states, spans, mask, position_bias, joint=True, return_dict=True, **kwargs)

    # The public features.

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        joint_experts: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Image embeddings.

        Args:
            pixel_values: (images, channels, image_size, image_size) float.
            bool_masked_pos: (images, patches), 1 where the mask token takes the patch's place; needs
                `image_mask_token`.
            joint_experts: run the layers from `fusion_start_layer` up through the joint experts and embed with their
                projection, as VLMo's second contrastive loss does; needs `joint_projection`.

        Returns:
            `pooler_output` (images, projection_dim), L2-normalised; `last_hidden_state` (images, tokens, width).

        Raises:
            ValueError: wrong number of dimensions, channels or pixels; an option that the config does not provide for.
        """
        self._check_joint_experts(joint_experts)
        outputs = self.image_pass(pixel_values, bool_masked_pos, joint=joint_experts, **kwargs)
        if joint_experts:
            return self._features(outputs, self.joint_projection.image(outputs.last_hidden_state[:, 0]), kwargs)
        return self._image_features(outputs, kwargs)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        joint_experts: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Text embeddings.

        Args:
            input_ids: (texts, tokens) int64, `[BOS] words [EOS]`, padded on either side.
            attention_mask: (texts, tokens), 0 where padding.
            joint_experts: as in `get_image_features`.

        Returns:
            `pooler_output` (texts, projection_dim), L2-normalised; `last_hidden_state` (texts, tokens, width).

        Raises:
            ValueError: no text, an id beyond the vocabulary, a text longer than the position table, or an option that
                the config does not provide for.
        """
        self._check_joint_experts(joint_experts)
        outputs = self.text_pass(input_ids, attention_mask, joint=joint_experts, **kwargs)
        if joint_experts:
            first = first_token(outputs.last_hidden_state, attention_mask)
            return self._features(outputs, self.joint_projection.text(first), kwargs)
        return self._text_features(outputs, attention_mask, kwargs)

    @can_return_tuple
    def get_multimodal_features(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Fused features of pairs: `last_hidden_state` (batch, image tokens + text tokens, width), image first.

        From `fusion_start_layer` up, all tokens use the `joint` experts. `pooler_output` (batch, width) is the
        state of the image's `[CLS]` or, with `multimodal_pooler`, what the pooler makes of the text's first token;
        `matching_logits` (batch, 2), with `matching_head`, scores "no match" and "match".
        Raises ValueError as the other two, and when there is not one text per image.
        """
        outputs = self.fused_pass(pixel_values, input_ids, attention_mask, **kwargs)
        states = outputs.last_hidden_state
        if self.multimodal_pooler is None:
            return self._features(outputs, states[:, 0], kwargs)
        text = first_token(states[:, self.config.num_image_tokens :], attention_mask)
        features = self._features(outputs, self.multimodal_pooler(text), kwargs)
        if self.matching_head is not None:
            features.matching_logits = self.matching_head(features.pooler_output)
        return features

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MomeOutput:
        """Embeds what is given: texts, images, or both and their similarities.

        Args:
            input_ids: (texts, tokens) int64.
            pixel_values: (images, channels, image_size, image_size) float.
            attention_mask: (texts, tokens), 0 where padding.
            return_loss: contrastive loss with image i and text i a pair, plus the router losses.

        Raises:
            ValueError: as `get_image_features` and `get_text_features`; neither modality given; `return_loss`
                without both or with unequal numbers.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("MomeModel got neither pixel_values nor input_ids: pass at least one")
        if return_loss:
            _check_pairs(pixel_values, input_ids)
        if input_ids is not None:
            self._check_input_ids(input_ids)  # before the image pass, which is the expensive one
        image = text = image_embeds = text_embeds = logits_per_image = loss = None
        if pixel_values is not None:
            image_outputs = self.image_pass(pixel_values, **kwargs)
            image = self._image_features(image_outputs, kwargs)
            image_embeds = image.pooler_output
        if input_ids is not None:
            text_outputs = self.text_pass(input_ids, attention_mask, **kwargs)
            text = self._text_features(text_outputs, attention_mask, kwargs)
            text_embeds = text.pooler_output
        if image is not None and text is not None:
            logits_per_image = self.similarity(image_embeds, text_embeds)
        if return_loss:
            loss = contrastive_loss(logits_per_image, same_caption(input_ids, attention_mask))
            loss = loss + self.router_loss(
                (image_outputs.router_logits, None), (text_outputs.router_logits, attention_mask)
            )
        only = image if text is None else text if image is None else None
        return MomeOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=None if logits_per_image is None else logits_per_image.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            last_hidden_state=only and only.last_hidden_state,
            hidden_states=only and only.hidden_states,
            attentions=only and only.attentions,
            router_logits=self._by_group(kwargs, image=image, text=text),
            image_model_output=image,
            text_model_output=text,
        )

    def similarity(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, joint_experts: bool = False
    ) -> torch.Tensor:
        """(images, projection_dim), (texts, projection_dim) → (images, texts): cosine times inverse temperature.

        `joint_experts`: as the embeddings were made; they have a temperature of their own.
        """
        self._check_joint_experts(joint_experts)
        scale = self.joint_projection.logit_scale if joint_experts else self.logit_scale
        return image_embeds @ text_embeds.T * scale.exp().to(image_embeds.device)

    def router_loss(
        self, *passes: tuple[tuple[torch.Tensor, ...] | None, torch.Tensor | None]
    ) -> torch.Tensor | float:
        """Weighted balance and z-losses, mean over layers and sum over groups.

        Args:
            passes: of one group each: router logits per layer (batch, tokens, experts), and the tokens' mask.

        Returns:
            A scalar, 0 for a model without routers.
        """
        config, total = self.config, 0.0
        for router_logits, token_mask in passes:
            for logits in router_logits or ():
                balance, z_loss = router_losses(logits, config.experts_per_token, token_mask)
                weighted = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss
                total = total + weighted / config.num_hidden_layers
        return total

    # Parts of the passes.

    def _embed_text(self, input_ids, position_ids, attention_mask) -> torch.Tensor:
        hidden_states = self.text_embedding(self.text_embedding.word_embeddings(input_ids), position_ids)
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        return hidden_states

    def _text_mask(self, hidden_states, attention_mask) -> torch.Tensor | None:
        if attention_mask is None or self.looks_at_values or self.config._attn_implementation != "sdpa":
            return create_bidirectional_mask(self.config, hidden_states, attention_mask)
        # (texts, 1, 1, tokens): every token sees what is no padding
        return additive_mask(attention_mask[:, None, None, :].bool(), hidden_states.dtype)

    def _image_features(self, outputs: MomeEncoderOutput, options: dict) -> MomeFeatures:
        return self._features(outputs, self._image_embeds(outputs), options)

    def _text_features(self, outputs: MomeEncoderOutput, mask: torch.Tensor | None, options: dict) -> MomeFeatures:
        return self._features(outputs, self._text_embeds(outputs, mask), options)

    def _image_embeds(self, outputs: MomeEncoderOutput) -> torch.Tensor:
        return F.normalize(self.image_projection(outputs.last_hidden_state[:, 0]), dim=-1)

    def _text_embeds(self, outputs: MomeEncoderOutput, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return F.normalize(self.text_projection(first_token(outputs.last_hidden_state, attention_mask)), dim=-1)

    def _features(self, outputs: MomeEncoderOutput, pooler_output: torch.Tensor, options: dict) -> MomeFeatures:
        return MomeFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pooler_output,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if self._wants_router_logits(options) else None,
        )

    def _wants_router_logits(self, options: dict) -> bool:
        wanted = options.get("output_router_logits")
        return self.config.output_router_logits if wanted is None else wanted

    def _by_group(self, options: dict, **passes) -> tuple[dict[str, torch.Tensor], ...] | None:
        """group=pass, … → per layer, {group: router logits}; `None` if not asked for or not routed."""
        routed = {group: each.router_logits for group, each in passes.items() if each and each.router_logits}
        if not routed or not self._wants_router_logits(options):
            return None
        return tuple(dict(zip(routed, layer)) for layer in zip(*routed.values()))

    # Bad input, refused before any heavy work.

    def _check_pixel_values(self, pixel_values: torch.Tensor):
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (images, channels, height, width) = "
                f"(images, {', '.join(map(str, expected))}): prepare images with the checkpoint's processor"
            )

    def _check_masked_patches(self, bool_masked_pos: torch.Tensor, pixel_values: torch.Tensor):
        if not self.config.image_mask_token:
            raise ValueError("bool_masked_pos needs a mask token, got a config with image_mask_token=False")
        expected = (pixel_values.shape[0], self.config.grid_size**2)
        if tuple(bool_masked_pos.shape) != expected:
            raise ValueError(
                f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}, expected (images, patches) = {expected}"
            )

    def _check_kept_patches(self, kept_patches: torch.Tensor, pixel_values: torch.Tensor):
        images, patches = pixel_values.shape[0], self.config.grid_size**2
        shape = tuple(kept_patches.shape)
        if len(shape) != 2 or shape[0] != images or not 1 <= shape[1] <= patches:
            raise ValueError(f"kept_patches has shape {shape}, expected (images, kept) = ({images}, 1…{patches})")

    def _check_joint_experts(self, joint_experts: bool):
        if joint_experts and self.joint_projection is None:
            raise ValueError("joint_experts=True needs their projections, got a config with joint_projection=False")

    def _check_input_ids(self, input_ids: torch.Tensor):
        config = self.config
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, expected (texts, tokens), both at least 1"
            )
        if input_ids.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, max_position_embeddings is "
                f"{config.max_position_embeddings}: shorten the text or tokenize it with truncation=True"
            )
        self._check_vocabulary(input_ids)

    def _check_vocabulary(self, input_ids: torch.Tensor):
        if not self.looks_at_values or torch.compiler.is_compiling() or input_ids.device.type == "meta":
            return
        rows = self.get_input_embeddings().weight.shape[0]
        lowest, highest = (int(bound) for bound in input_ids.aminmax())
        if lowest < 0 or highest >= rows:
            bad = lowest if lowest < 0 else highest
            raise ValueError(f"input_ids holds {bad}, vocab_size is {rows}: use the checkpoint's own tokenizer")


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as what is added to scores: SDPA would make it in every layer, with a wait for the device each."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def first_token(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(texts, tokens, width) → (texts, width): `[BOS]`, the first token that is no padding."""
    if attention_mask is None:
        return states[:, 0]
    return states[torch.arange(states.shape[0], device=states.device), attention_mask.long().argmax(dim=1)]


def text_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(texts, tokens) → position of each token in its text, padding on either side not counted."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape[0], -1)
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _check_pairs(pixel_values: torch.Tensor | None, input_ids: torch.Tensor | None):
    images, texts = (0 if given is None else given.shape[0] for given in (pixel_values, input_ids))
    if images != texts or not images:
        raise ValueError(f"{images} images and {texts} texts: pass one text for each image")


# ------------------------------------------------------------------------------------------------- captioner


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


@dataclass
class MomeCaptionOutput(ModelOutput):
    """Captions of images.

    Attributes:
        loss: weighted sum of contrastive, caption and router losses, with `labels`.
        logits: (batch, tokens, vocabulary), next-token logits in line with `input_ids`.
        past_key_values: cache of the image's and the caption's keys and values.
        hidden_states: (batch, tokens, width) before each layer and at the end, image tokens first.
        attentions: per layer, (batch, heads, tokens, keys).
        router_logits: per layer, a dict from group to logits (batch, tokens, experts).
        contrastive_loss, caption_loss: the parts of `loss`, unweighted.
        image_embeds: (images, projection_dim), L2-normalised, where images went through this call.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[dict[str, torch.Tensor], ...] | None = None
    contrastive_loss: torch.Tensor | None = None
    caption_loss: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None


class MomeForConditionalGeneration(MomePreTrainedModel, MomeGenerationMixin):
    """Captions images, and trains embeddings and captions together.

    `input_ids` may hold the image as `num_image_tokens` ids `image_token_id` (as `generate()` does) or only the
    text; either way logits line up with `input_ids`.
    """

    _auto_class = "AutoModelForImageTextToText"
    generation_config_class = MomeGenerationConfig
    _tied_weights_keys = {"lm_head.decoder.weight": "model.text_embedding.word_embeddings.weight"}

    def __init__(self, config: MomeConfig):
        super().__init__(config)
        self.model = MomeModel(config)
        self.lm_head = MomeCaptionHead(config)
        self.gradient_checkpointing = False
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`; beside the weights is all code that the config names."""
        # Not needed here, but the Hub's loader fetches, and a save copies, what this file imports: without the line a
        # fine-tuned model would be saved without the pipelines that its config names.
        from .pipeline_mome import MomeImageCaptioningPipeline  # noqa: F401

        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head.decoder = value

    @property
    def logit_scale(self) -> nn.Parameter:
        """(), log of the inverse temperature, as `MomeModel` has it."""
        return self.model.logit_scale

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """See `MomeModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """See `MomeModel.get_text_features`."""
        return self.model.get_text_features(input_ids, attention_mask, **kwargs)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_tokens_in_input: bool | None = None,
        image_outputs: MomeEncoderOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MomeCaptionOutput:
        """Next-token logits of captions, and with `labels` the joint loss of the pairs.

        Args:
            input_ids: (batch, tokens) int64.
            pixel_values: (images, channels, image_size, image_size); each image may serve `batch / images` rows.
            attention_mask: (batch, tokens seen so far), 0 where padding; image tokens may be left out.
            position_ids: (batch, tokens), counting image tokens if `input_ids` or the cache holds them.
            past_key_values: what earlier calls have seen, the image included.
            inputs_embeds: (batch, tokens, width), in place of `input_ids`.
            labels: (batch, tokens), as `input_ids`; -100 is ignored, and so are labels of image tokens. Position t is
                predicted from the positions before it.
            logits_to_keep: logits of the last so many tokens only, or of these positions; 0: all.
            image_tokens_in_input: whether `input_ids` holds the image tokens. `None`: look; when compiled nobody can
                look, `None` is `False`, and image tokens must come first, before any padding.
            image_outputs: what `model.image_pass(pixel_values, return_key_values=True)` gave, in place of another one;
                with fewer tokens than an image has if it was given `kept_patches`.

        Raises:
            ValueError: labels without images or of another shape, a text longer than the position table, an id
                beyond the vocabulary, images of a wrong size, image tokens that are too few or behind text.
        """
        loss_kwargs = {key: kwargs.pop(key) for key in ("num_items_in_batch", "shift_labels") if key in kwargs}
        if labels is not None:
            self._check_labels(labels, input_ids, pixel_values)
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = MomeCache(self.config)
        if pixel_values is not None and cached_image_tokens(past_key_values):
            pixel_values = None  # the cache has seen it

        if pixel_values is not None:
            self.model._check_pixel_values(pixel_values)
        image_embedding = self.get_input_embeddings().weight[self.config.image_token_id]
        context = CaptionContext(
            self.config,
            image_embedding,
            input_ids,
            inputs_embeds,
            pixel_values,
            attention_mask,
            position_ids,
            past_key_values,
            image_tokens_in_input,
            None if image_outputs is None else image_outputs.last_hidden_state.shape[1],
        )
        if input_ids is not None:
            self.model._check_vocabulary(input_ids)
        image = prefix = None
        if pixel_values is not None:
            image = image_outputs
            if image is None:
                image = self.model.image_pass(pixel_values, return_key_values=True, **kwargs)
            prefix = tuple(tuple(context.per_row(states) for states in pair) for pair in image.key_values)
        text = self._caption_pass(context, prefix, past_key_values, logits_to_keep, **kwargs)
        logits = self._logits(context, image, text.last_hidden_state, logits_to_keep)

        loss = caption_loss = contrastive = image_embeds = None
        if image is not None:
            image_embeds = self.model._image_embeds(image)
        if labels is not None:
            text_logits = logits if not context.placed else logits[:, -context.text_tokens :]
            caption_loss = self._caption_loss(context, text_logits, labels, **loss_kwargs)
            contrastive, router_loss = self._contrastive_loss(context, image, image_embeds, text, **kwargs)
            loss = self.config.caption_loss_weight * caption_loss + router_loss
            loss = loss + self.config.contrastive_loss_weight * contrastive

        if text.router_logits:  # not of [MASK] tokens
            text.router_logits = tuple(each[:, : context.text_tokens] for each in text.router_logits)
        return MomeCaptionOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=self._join_states(context, image, text),
            attentions=self._join_attentions(context, image, text),
            router_logits=self.model._by_group(kwargs, image=image, text=text),
            contrastive_loss=contrastive,
            caption_loss=caption_loss,
            image_embeds=image_embeds,
        )

    # Parts of forward, in its order.

    @staticmethod
    def _check_labels(labels, input_ids, pixel_values):
        if pixel_values is None:
            raise ValueError(f"labels of shape {tuple(labels.shape)} without images: pass pixel_values as well")
        if input_ids is None:
            raise ValueError("labels without input_ids: the joint loss compares captions, pass input_ids")
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}: they must be equal"
            )
        _check_pairs(pixel_values, input_ids)

    def _caption_pass(self, context, prefix, past_key_values, logits_to_keep, **kwargs) -> MomeEncoderOutput:
        """Text states (batch, text tokens, width), behind them those of the `[MASK]` tokens if there are any."""
        config, words = self.config, self.get_input_embeddings()
        masks = 0
        if config.caption_objective == "masked":
            keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
            masks = min(keep, context.text_tokens) or context.text_tokens
        embeds = words(context.text_ids) if context.text_embeds is None else context.text_embeds
        position_ids = context.position_ids
        if masks:  # a [MASK] stands where the next token will
            mask_token = words.weight[config.mask_token_id].to(embeds.dtype)
            embeds = torch.cat([embeds, mask_token.expand(context.batch, masks, -1)], dim=1)
            behind = (position_ids[:, -masks:] + 1).clamp(max=config.max_position_embeddings - 1)
            position_ids = torch.cat([position_ids, behind], dim=1)
        hidden_states = self.model.text_embedding(embeds, position_ids)

        bias_table = self.model.encoder.position_bias
        mask = context.causal_mask(hidden_states, materialise=bool(masks) or bias_table is not None)
        if not self.model.looks_at_values and bias_table is None and mask is not None and mask.dtype == torch.bool:
            mask = additive_mask(mask, hidden_states.dtype)
        if masks:
            mask = self._mask_for_mask_tokens(mask, masks)
        position_bias = None
        if bias_table is not None:
            key_positions = context.key_positions(mask.shape[-1] - masks)
            if masks:
                key_positions = torch.cat([key_positions, position_ids[:, -masks:]], dim=1)
            position_bias = bias_table.text(position_ids, key_positions)
        outputs = self.model.encoder(
            hidden_states,
            (("text", hidden_states.shape[1]),),
            mask,
            position_bias,
            prefix=prefix,
            past_key_values=past_key_values,
            key_order=context.key_order,
            num_mask_tokens=masks,
            causal=True,
            return_dict=True,
            **kwargs,
        )
        if past_key_values is not None:
            past_key_values.num_image_tokens = context.num_image_tokens
        return outputs

    def _mask_for_mask_tokens(self, mask: torch.Tensor | None, masks: int) -> torch.Tensor | None:
        if mask is not None and mask.ndim == 4:
            return extend_mask(mask, masks)
        if masks > 1:  # flash attention: no mask but padding, and causal from the bottom right
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} can't score {masks} tokens at once with "
                "caption_objective='masked': pass logits_to_keep=1 or load the model with attn_implementation='sdpa'"
            )
        return None if mask is None else F.pad(mask, (0, masks), value=1)

    def _logits(self, context, image, text_states, logits_to_keep) -> torch.Tensor:
        """Head over the rows that are asked for; with masked captions the row of a token is that of its `[MASK]`."""
        last = logits_to_keep if isinstance(logits_to_keep, int) else 0
        states = text_states[:, -context.text_tokens :]  # behind the tokens, and so last, are the [MASK] tokens
        only_text = 0 < last <= context.text_tokens and context.order is None
        if context.placed and not only_text:
            states = torch.cat([context.per_row(image.last_hidden_state), states], dim=1)
            states = context.in_input_order(states)
        return self.lm_head(states[:, -last:] if isinstance(logits_to_keep, int) else states[:, logits_to_keep])

    def _caption_loss(self, context, logits, labels, shift_labels=None, **loss_kwargs) -> torch.Tensor:
        return self.loss_function(
            logits=logits.contiguous(),
            labels=context.text_part(labels),
            vocab_size=self.lm_head.decoder.weight.shape[0],
            shift_labels=None if shift_labels is None else context.text_part(shift_labels).contiguous(),
            **loss_kwargs,
        )

    def _contrastive_loss(self, context, image, image_embeds, caption, **kwargs):
        """Contrastive loss of the batch, and the router losses of all three passes."""
        text_ids, text_mask = context.text_ids, context.text_mask()
        text = self.model.text_pass(text_ids, text_mask, **kwargs)
        text_embeds = self.model._text_embeds(text, text_mask)
        logits_per_image = self.model.similarity(image_embeds, text_embeds)
        loss = contrastive_loss(logits_per_image, same_caption(text_ids, text_mask))
        if self.config.experts_per_group == 1:
            return loss, 0.0
        # The text group serves the text pass and the caption pass: its tokens are those of both.
        rows = context.text_tokens
        text_logits = tuple(
            torch.cat([each, captioned[:, :rows]], dim=1)
            for each, captioned in zip(text.router_logits, caption.router_logits)
        )
        both_masks = None if text_mask is None else torch.cat([text_mask, text_mask], dim=1)
        return loss, self.model.router_loss((image.router_logits, None), (text_logits, both_masks))

    @staticmethod
    def _join_states(context, image, text) -> tuple[torch.Tensor, ...] | None:
        if text.hidden_states is None:
            return None
        states = [None if each is None else each[:, : context.text_tokens] for each in text.hidden_states]
        if image is not None:
            pairs = zip(image.hidden_states, states)
            states = [None if t is None else torch.cat([context.per_row(i), t], dim=1) for i, t in pairs]
        return tuple(states)

    @staticmethod
    def _join_attentions(context, image, text) -> tuple[torch.Tensor, ...] | None:
        """Image rows above text rows; an image row has weight 0 for what is behind the image."""
        if text.attentions is None:
            return None
        masks = 0 if not text.attentions else text.attentions[0].shape[2] - context.text_tokens
        weights = [each[:, :, : context.text_tokens, : each.shape[3] - masks] for each in text.attentions]
        if image is not None:
            pairs = zip(image.attentions, weights)
            weights = [
                torch.cat([F.pad(context.per_row(i), (0, t.shape[3] - i.shape[3])), t], dim=2) for i, t in pairs
            ]
        return tuple(weights)


__all__ = ["MomeForConditionalGeneration", "MomeModel", "MomePreTrainedModel"]
