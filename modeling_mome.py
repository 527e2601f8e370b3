"""MoME: one transformer for images and text whose feed-forwards are experts of a modality.

- one trunk: VLMo (2111.02358), BEiT-3 (2208.10442) and SigLIP (2303.15343) are three of its configurations;
- hard modality routing as contiguous slices, learned top-k routing inside a modality where the config asks for it;
- `MomeModel`: image, text and fused features, one embedding space, multi-positive contrastive loss;
- `MomeForConditionalGeneration`: captions through the stock `generate()`, the image encoded once.

    pixel_values ─ image embedding ─┐                     ┌─ pool ─ project ─ image_embeds ─┐
                                    ├─ N × (attention,    │                                 ├─ logits_per_image
    input_ids ──── text embedding ──┘   routed experts) ──┼─ pool ─ project ─ text_embeds ──┘
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

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder

from .captioning_mome import (
    CaptionContext,
    CaptionInputs,
    MomeCache,
    additive_mask,
    cached_image_tokens,
    start_captions,
)
from .compatibility_mome import CACHE_NAME, accepts_cache
from .configuration_mome import MomeConfig
from .generation_mome import MomeGenerationMixin
from .guidance_mome import MomeGenerationConfig
from .heads_mome import MomeCaptionHead, MomeJointProjection, MomeMultimodalPooler, image_pooling, text_pooling
from .inputs_mome import (
    LOSS_OPTIONS,
    check_input_ids,
    check_joint_experts,
    check_kept_patches,
    check_labels,
    check_masked_patches,
    check_modalities,
    check_no_other_inputs,
    check_number_of_labels,
    check_pairs,
    check_pixel_values,
    check_vocabulary,
    image_places,
    text_mask,
    text_positions,
    text_tokens,
)
from .losses_mome import caption_loss, joined_passes, label_share, pair_loss, router_loss_of_passes, same_caption
from .outputs_mome import MomeCaptionOutput, MomeEncoderOutput, MomeFeatures, MomeOutput
from .trunk_mome import MomeEncoder, MomeImageEmbedding, MomeLayer, MomePreTrainedModel, MomeTextEmbedding

# transformers lets a model choose its experts' implementation if its file says `@use_experts_implementation`: the
# decorated class is MomeExperts in trunk_mome.py.


class MomeModel(MomePreTrainedModel):
    """Embeds images and texts in one space, alone or fused."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]
    # For whoever asks a model what it can record: the encoder returns its router logits itself, without hooks.
    _can_record_outputs = {"router_logits": OutputRecorder(MomeLayer, index=3)}
    # Whether the values of ids and masks are looked at: for a helpful error, and to leave out a mask that hides
    # nothing. A look waits for the device: a training loop over ids that it made itself may set it to False.
    looks_at_values = True
    # transformers' `Trainer` divides the mean over pairs by the steps it accumulates: labels don't count here.
    accepts_loss_kwargs = False

    def __init__(self, config: MomeConfig):
        super().__init__(config)
        self.image_embedding = MomeImageEmbedding(config)
        self.text_embedding = MomeTextEmbedding(config)
        self.encoder = MomeEncoder(config)
        self.image_pooling, self.text_pooling = image_pooling(config), text_pooling(config)
        projection = config.hidden_size, config.projection_dim, config.projection_bias
        self.image_projection = nn.Linear(*projection) if config.image_projection else nn.Identity()
        self.text_projection = nn.Linear(*projection)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = nn.Parameter(torch.empty(())) if config.contrastive_objective == "sigmoid" else None
        self.joint_projection = MomeJointProjection(config) if config.joint_projection else None
        self.multimodal_pooler = MomeMultimodalPooler(config) if config.multimodal_pooler else None
        self.matching_head = nn.Linear(config.hidden_size, 2) if config.matching_head else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (MomeModel, MomeJointProjection)):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        if isinstance(module, MomeModel) and module.logit_bias is not None:
            init.constant_(module.logit_bias, self.config.logit_bias_init_value)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.text_embedding.word_embeddings = value

    # The passes: embed → layers → norm, and from their states pool → project.

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
        check_pixel_values(self.config, pixel_values)
        if bool_masked_pos is not None:
            check_masked_patches(self.config, bool_masked_pos, pixel_values)
        if kept_patches is not None:
            check_kept_patches(self.config, kept_patches, pixel_values)
        hidden_states, places = self.image_embedding(pixel_values, bool_masked_pos), None
        if kept_patches is not None:
            places = image_places(self.config, kept_patches)
            hidden_states = hidden_states.gather(1, places[..., None].expand(-1, -1, hidden_states.shape[-1]))
        biases = self.encoder.position_bias
        position_bias = None if biases is None else biases.image(pixel_values.device, places)
        spans = (("image", hidden_states.shape[1]),)
        return self.encoder(hidden_states, spans, None, position_bias, return_dict=True, **kwargs)  # layers, norm

    def project_image(self, states: torch.Tensor, joint_experts: bool = False) -> torch.Tensor:
        """States of an image pass (images, image tokens, width) → (images, projection_dim), L2-normalised."""
        pooled = self.image_pooling(states)
        if joint_experts:
            return self.joint_projection.image(pooled)
        return F.normalize(self.image_projection(pooled), dim=-1)

    def text_pass(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> MomeEncoderOutput:
        """input_ids (texts, tokens) → states (texts, tokens, width), those that `text_tokens` makes of them."""
        check_no_other_inputs(kwargs)
        check_input_ids(self.config, input_ids, self.vocabulary)
        input_ids, attention_mask = text_tokens(self.config, input_ids, attention_mask)
        position_ids = text_positions(input_ids, attention_mask)
        hidden_states = self._embed_text(input_ids, position_ids, attention_mask)
        biases = self.encoder.position_bias
        position_bias = None if biases is None else biases.text(position_ids, position_ids)
        mask = self._text_mask(hidden_states, attention_mask)
        spans = (("text", hidden_states.shape[1]),)
        return self.encoder(hidden_states, spans, mask, position_bias, return_dict=True, **kwargs)  # layers, norm

    def project_text(
        self, states: torch.Tensor, attention_mask: torch.Tensor | None = None, joint_experts: bool = False
    ) -> torch.Tensor:
        """States of a text pass (texts, tokens, width) and the mask of `text_tokens` → (texts, projection_dim).

        The embeddings are L2-normalised.
        """
        pooled = self.text_pooling(states, attention_mask)
        if joint_experts:
            return self.joint_projection.text(pooled)
        return F.normalize(self.text_projection(pooled), dim=-1)

    def fused_pass(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> MomeEncoderOutput:
        """An image and a text each → states (batch, image tokens + text tokens, width), every token seeing all."""
        check_no_other_inputs(kwargs)
        check_pixel_values(self.config, pixel_values)
        check_input_ids(self.config, input_ids, self.vocabulary)
        check_pairs(pixel_values, input_ids)
        attention_mask = text_mask(self.config, input_ids, attention_mask)
        position_ids = text_positions(input_ids, attention_mask)
        image, text = self.image_embedding(pixel_values), self._embed_text(input_ids, position_ids, attention_mask)
        hidden_states = torch.cat([image, text.to(image.dtype)], dim=1)
        spans = (("image", image.shape[1]), ("text", text.shape[1]))
        biases = self.encoder.position_bias
        position_bias = None if biases is None else biases.fused(position_ids)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (image.shape[1], 0), value=1)
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        return self.encoder(hidden_states, spans, mask, position_bias, joint=True, return_dict=True, **kwargs)

    def _embed_text(self, input_ids, position_ids, attention_mask) -> torch.Tensor:
        hidden_states = self.text_embedding(self.text_embedding.word_embeddings(input_ids), position_ids)
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        return hidden_states

    def _text_mask(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        if attention_mask is None or self.looks_at_values or self.config._attn_implementation != "sdpa":
            return create_bidirectional_mask(self.config, hidden_states, attention_mask)
        # (texts, 1, 1, tokens): every token sees what is no padding
        return additive_mask(attention_mask[:, None, None, :].bool(), hidden_states.dtype)

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
        check_joint_experts(self.config, joint_experts)
        outputs = self.image_pass(pixel_values, bool_masked_pos, joint=joint_experts, **kwargs)
        return self._features(outputs, self.project_image(outputs.last_hidden_state, joint_experts), kwargs)

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
            input_ids: (texts, tokens) int64, as the tokenizer writes them, padded on either side.
            attention_mask: (texts, tokens), 0 where padding; `None`: where `pad_token_id` stands at either end.
            joint_experts: as in `get_image_features`.

        Returns:
            `pooler_output` (texts, projection_dim), L2-normalised; `last_hidden_state` (texts, tokens, width), with
            `fixed_text_length` as many tokens as there are positions.

        Raises:
            ValueError: no text, an id beyond the vocabulary, a text longer than the position table, or an option that
                the config does not provide for.
        """
        check_joint_experts(self.config, joint_experts)
        check_input_ids(self.config, input_ids, self.vocabulary)
        input_ids, attention_mask = text_tokens(self.config, input_ids, attention_mask)
        outputs = self.text_pass(input_ids, attention_mask, joint=joint_experts, **kwargs)
        embeds = self.project_text(outputs.last_hidden_state, attention_mask, joint_experts)
        return self._features(outputs, embeds, kwargs)

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
        pooled state of the image or, with `multimodal_pooler`, what the pooler makes of the text's first token;
        `matching_logits` (batch, 2), with `matching_head`, scores "no match" and "match".
        Raises ValueError as the other two, and when there is not one text per image.
        """
        attention_mask = text_mask(self.config, input_ids, attention_mask)
        outputs = self.fused_pass(pixel_values, input_ids, attention_mask, **kwargs)
        states = outputs.last_hidden_state
        if self.multimodal_pooler is None:
            return self._features(outputs, self.image_pooling(states[:, : self.config.num_image_tokens]), kwargs)
        text = self.text_pooling(states[:, self.config.num_image_tokens :], attention_mask)
        features = self._features(outputs, self.multimodal_pooler(text), kwargs)
        if self.matching_head is not None:
            features["matching_logits"] = self.matching_head(features.pooler_output)
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
            attention_mask: (texts, tokens), 0 where padding; `None`: as in `get_text_features`.
            return_loss: contrastive loss with image i and text i a pair, plus the router losses.

        Raises:
            ValueError: as `get_image_features` and `get_text_features`; neither modality given; `return_loss`
                without both or with unequal numbers.
        """
        check_modalities(pixel_values, input_ids, return_loss, kwargs)
        if input_ids is not None:
            check_input_ids(self.config, input_ids, self.vocabulary)  # before the image pass, the expensive one
            input_ids, attention_mask = text_tokens(self.config, input_ids, attention_mask)
        passes, embeds = {}, {}
        if pixel_values is not None:
            passes["image"] = self.image_pass(pixel_values, **kwargs)
            embeds["image"] = self.project_image(passes["image"].last_hidden_state)
        if input_ids is not None:
            passes["text"] = self.text_pass(input_ids, attention_mask, **kwargs)
            embeds["text"] = self.project_text(passes["text"].last_hidden_state, attention_mask)
        logits_per_image = loss = None
        if len(embeds) == 2:
            logits_per_image = self.similarity(embeds["image"], embeds["text"])
        if return_loss:
            loss = pair_loss(self.config, logits_per_image, same_caption(input_ids, attention_mask))
            routing = (passes["image"].router_logits, None), (passes["text"].router_logits, attention_mask)
            loss = loss + router_loss_of_passes(self.config, *routing)
        return self._joined_outputs(passes, embeds, logits_per_image, loss, kwargs)

    def similarity(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, joint_experts: bool = False
    ) -> torch.Tensor:
        """(images, projection_dim), (texts, projection_dim) → (images, texts): cosine times inverse temperature.

        With the sigmoid objective plus its bias. `joint_experts`: as the embeddings were made; they have a temperature
        of their own, and no bias.
        """
        check_joint_experts(self.config, joint_experts)
        scale = self.joint_projection.logit_scale if joint_experts else self.logit_scale
        logits = image_embeds @ text_embeds.T * scale.exp().to(image_embeds.device)
        return logits if self.logit_bias is None or joint_experts else logits + self.logit_bias.to(logits.device)

    # What is returned.

    def _joined_outputs(self, passes: dict, embeds: dict, logits_per_image, loss, options: dict) -> MomeOutput:
        """The image pass, the text pass, or both as one output."""
        features = {group: self._features(each, embeds[group], options) for group, each in passes.items()}
        only = next(iter(features.values())) if len(features) == 1 else None
        return MomeOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=None if logits_per_image is None else logits_per_image.T,
            text_embeds=embeds.get("text"),
            image_embeds=embeds.get("image"),
            last_hidden_state=only and only.last_hidden_state,
            hidden_states=only and only.hidden_states,
            attentions=only and only.attentions,
            router_logits=self._by_group(options, **features),
            image_model_output=features.get("image"),
            text_model_output=features.get("text"),
        )

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

    @property
    def vocabulary(self) -> int | None:
        """Rows of the word embedding, which ids are checked against; `None` if values are not looked at."""
        return self.get_input_embeddings().weight.shape[0] if self.looks_at_values else None


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
        # Not needed here, but the Hub's loader fetches, and a save copies, what this file imports.
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

    logit_scale = property(lambda self: self.model.logit_scale, doc="(), log of the inverse temperature")
    logit_bias = property(lambda self: self.model.logit_bias, doc="(), of the sigmoid objective, else `None`")

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """See `MomeModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """See `MomeModel.get_text_features`."""
        return self.model.get_text_features(input_ids, attention_mask, **kwargs)

    def image_pass_for_captions(self, pixel_values: torch.Tensor, **kwargs) -> MomeEncoderOutput:
        """`MomeModel.image_pass` with keys and values of the image, which captions look at."""
        return self.model.image_pass(pixel_values, return_key_values=True, **kwargs)

    @merge_with_config_defaults
    @can_return_tuple
    @accepts_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_tokens_in_input: bool | None = None,
        image_outputs: MomeEncoderOutput | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MomeCaptionOutput:
        """Next-token logits of captions, and with `labels` the joint loss of the pairs.

        Args: those of `CaptionInputs`, and
            labels: (batch, tokens), as `input_ids`, predicted from what is before; -100 and image tokens are not.
            use_cache: return what was seen, the image included, for the next call.
            image_outputs: what `image_pass_for_captions(pixel_values)` gave, with `kept_patches` fewer tokens.

        Raises:
            ValueError: labels without images or of another shape, a text longer than the position table, an id
                beyond the vocabulary, images of a wrong size, image tokens that are too few or behind text.
        """
        loss_options = {key: kwargs.pop(key) for key in LOSS_OPTIONS if key in kwargs}
        check_labels(labels, input_ids, pixel_values, loss_options)
        if labels is not None:
            use_cache, tokens = False, input_ids.shape[1]
            input_ids, attention_mask, labels = start_captions(self.config, input_ids, attention_mask, labels)
        if use_cache and cache is None:
            cache = MomeCache(self.config)
        if cached_image_tokens(cache):
            pixel_values = None  # the cache has seen it
        given = input_ids, inputs_embeds, pixel_values, attention_mask, position_ids, cache
        image_tokens = None if image_outputs is None else image_outputs.last_hidden_state.shape[1]
        caption = self._caption_context(CaptionInputs(*given, logits_to_keep, image_tokens_in_input, image_tokens))

        image = image_embeds = None
        if pixel_values is not None:
            image = image_outputs or self.image_pass_for_captions(pixel_values, **kwargs)
            image_embeds = self.model.project_image(image.last_hidden_state)
        text = self.caption_pass(caption, image, **kwargs)
        logits = self.lm_head(caption.states_to_predict_from(image, text))
        losses = {}
        if labels is not None:
            losses = self._losses(caption, image, image_embeds, text, logits, labels, loss_options, **kwargs)
            logits = logits[:, -tokens:]  # without what `start_captions` has put before them
        return MomeCaptionOutput(
            logits=logits,
            **{CACHE_NAME: cache if use_cache else None},
            hidden_states=caption.join_hidden_states(image, text),
            attentions=caption.join_attentions(image, text),
            router_logits=self.model._by_group(kwargs, **{"image": image, self.config.caption_group: text}),
            image_embeds=image_embeds,
            **losses,
        )

    def _caption_context(self, inputs: CaptionInputs) -> CaptionContext:
        if inputs.pixel_values is not None:
            check_pixel_values(self.config, inputs.pixel_values)
        if self.model.looks_at_values:
            inputs.find_padding(self.config)
        image_embedding = self.get_input_embeddings().weight[self.config.image_token_id]
        context = CaptionContext(self.config, image_embedding, inputs)
        if inputs.input_ids is not None:
            check_vocabulary(inputs.input_ids, self.model.vocabulary)
        return context

    def caption_pass(self, caption: CaptionContext, image: MomeEncoderOutput | None, **kwargs) -> MomeEncoderOutput:
        """Text states (batch, text tokens, width), behind them those of the `[MASK]` tokens if there are any."""
        words = self.get_input_embeddings()
        embeds = words(caption.text_ids) if caption.text_embeds is None else caption.text_embeds
        embeds, position_ids = caption.with_mask_tokens(embeds, words.weight)
        hidden_states = self.model.text_embedding(embeds, position_ids)
        mask, position_bias = caption.mask_and_bias(hidden_states, position_ids, self.model.encoder.position_bias)
        if not self.model.looks_at_values and position_bias is None and mask is not None and mask.dtype == torch.bool:
            mask = additive_mask(mask, hidden_states.dtype)
        outputs = self.model.encoder(
            hidden_states,
            ((self.config.caption_group, hidden_states.shape[1]),),
            mask,
            position_bias,
            prefix=caption.prefix(image),
            cache=caption.cache,
            key_order=caption.key_order,
            num_mask_tokens=caption.num_mask_tokens,
            causal=True,
            return_dict=True,
            **kwargs,
        )
        if caption.cache is not None:
            caption.cache.num_image_tokens = caption.num_image_tokens
        if outputs.router_logits:  # not of [MASK] tokens
            outputs.router_logits = tuple(each[:, : caption.text_tokens] for each in outputs.router_logits)
        return outputs

    def _losses(
        self, caption, image, image_embeds, captioned, logits, labels, options, **kwargs
    ) -> dict[str, torch.Tensor]:
        """The joint loss and its parts, by their names in the output; the captions also go through the text pass.

        As a part of a batch with `num_items_in_batch` labels, as transformers' `Trainer` passes it, all of them count
        by the share that this call holds: see `label_share`.
        """
        config, text_ids, text_mask = self.config, *text_tokens(self.config, caption.text_ids, caption.text_mask())
        text_logits = logits[:, -caption.text_tokens :] if caption.placed else logits
        num_items, shift_labels = (options.get(name) for name in ("num_items_in_batch", "shift_labels"))
        if self.model.looks_at_values:
            check_number_of_labels(num_items)
        counted = labels if config.text_start_token else labels[:, 1:]  # as the caller has counted them
        share = 1.0 if num_items is None else label_share(counted, num_items, shift_labels)
        if shift_labels is not None:
            added = labels.shape[1] - shift_labels.shape[1]
            shift_labels = caption.text_only(F.pad(shift_labels, (added, 0), value=-100))
        captions = caption_loss(text_logits, caption.text_only(labels), shift_labels=shift_labels)
        text = self.model.text_pass(text_ids, text_mask, **kwargs)
        text_embeds = self.model.project_text(text.last_hidden_state, text_mask)
        logits_per_image = self.model.similarity(image_embeds, text_embeds)
        contrastive = pair_loss(config, logits_per_image, same_caption(text_ids, text_mask))
        passes = [(image.router_logits, None), (text.router_logits, text_mask)]
        passes += [(captioned.router_logits, caption.text_mask())]
        if config.caption_group == "text":  # it serves two passes: its tokens are those of both
            passes[1:] = [joined_passes(*passes[1:])]
        loss = config.caption_loss_weight * captions + router_loss_of_passes(config, *passes)
        loss = loss + config.contrastive_loss_weight * contrastive
        losses = {"loss": loss, "contrastive_loss": contrastive, "caption_loss": captions}
        return {name: share * each for name, each in losses.items()}


__all__ = ["MomeForConditionalGeneration", "MomeModel", "MomePreTrainedModel"]
