"""CoCa as open_clip builds it (2205.01917): embeds images and texts in one space, and captions images.

- loads what was trained with open_clip (`python -m mome.convert coca`), and gives what open_clip gives;
- `CocaModel`: image and text embeddings, contrastive loss;
- `CocaForConditionalGeneration`: captions through the stock `generate()`, with a cache; the joint loss.

    pixel_values ─ image encoder ─ pooler ─┬ first query ─ project ──────────────── image_embeds ─┐
                                           └ the others ──────────┐                               ├─ logits_per_image
    input_ids ─── text encoder ─┬ [CLS] ─ norm ─ project ─────────┼──────────────── text_embeds ──┘
                                └ words ─ decoder, which looks at ┴ ─ lm_head ─ caption logits

The text encoder is causal. Embeddings need the `[CLS]` behind the text, captions don't, and no word sees it: the
words' states, and their keys and values in a cache, are the same for both.

**Who sees whom.** Upstream puts `[CLS]` behind 76 tokens, text and filler, and hides keys by a mask that is shifted by
one (`correct_cls_mask=False`, all published weights): a key is hidden from everyone if the token *before* it is the
filler. So `[CLS]` sees the words and one filler token behind them, but not itself unless the text fills the table:

               w1 w2 w3  0  0  0 CLS
    w3          1  1  1  0  0  0  0
    CLS         1  1  1  1  0  0  0

Nothing sees the other filler tokens, so that one of them is all that is computed here: texts may be padded or not, on
either side. Whether a word of the text is the filler (`!` inside of a word of CLIP's vocabulary) is kept in the cache.

Glossary of shapes: images; texts; rows (captions, several for an image in a row); tokens; queries (of the pooler);
width (`hidden_size`); vision width; heads; head_dim.
"""

import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .captioning_mome import MomeCache, additive_mask, cached_image_tokens, prepare_prompt
from .compatibility_mome import CACHE_NAME, accepts_cache, is_exporting
from .configuration_coca import CocaConfig
from .configuration_mome import quoted
from .generation_mome import MomeGenerationMixin
from .guidance_mome import MomeGenerationConfig, eos_token_ids
from .inputs_mome import (
    check_input_ids,
    check_labels,
    check_no_other_inputs,
    check_number_of_labels,
    check_pairs,
    check_pixel_values,
    check_position_ids,
    check_positions,
    check_text_positions,
    check_vocabulary,
    filled_texts,
    text_mask,
)
from .kernels_mome import MomeLinear
from .losses_mome import caption_loss, contrastive_loss, label_share, same_caption
from .outputs_mome import MomeCaptionOutput, MomeEncoderOutput, MomeFeatures, MomeOutput
from .towers_coca import (
    CocaAttentionPooler,
    CocaDecoder,
    CocaEncoder,
    CocaImageEmbedding,
    CocaPreTrainedModel,
    CocaTextEmbedding,
    KeyValues,
    all_states,
    asked_for,
)


class CocaModel(CocaPreTrainedModel):
    """Embeds images and texts in one space."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^decoder\."]
    # Whether the values of ids and masks are looked at, see `MomeModel`.
    looks_at_values = True
    # transformers' `Trainer` divides the mean over pairs by the steps it accumulates, see `MomeModel`.
    accepts_loss_kwargs = False
    logit_bias = None  # of the sigmoid objective, which CoCa has not

    def __init__(self, config: CocaConfig):
        super().__init__(config)
        self.image_embedding = CocaImageEmbedding(config)
        self.image_encoder = CocaEncoder.of_images(config)
        self.image_pooler = CocaAttentionPooler(config)
        self.image_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_embedding = CocaTextEmbedding(config)
        self.text_encoder = CocaEncoder.of_texts(config)
        self.text_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CocaModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.text_embedding.word_embeddings = value

    # The passes: embed → layers → pool → project.

    def image_pass(self, pixel_values: torch.Tensor, **kwargs) -> MomeEncoderOutput:
        """pixel_values (images, channels, height, width) → states of the pooler's queries (images, queries, width)."""
        check_pixel_values(self.config, pixel_values)
        hidden_states = self.image_embedding(pixel_values)
        outputs = self.image_encoder(hidden_states, return_dict=True, **all_states(kwargs))
        outputs["last_hidden_state"] = self.image_pooler(outputs.last_hidden_state)
        return _selected(outputs, kwargs)

    def project_image(self, states: torch.Tensor) -> torch.Tensor:
        """States of an image pass (images, queries, width) → (images, projection_dim), L2-normalised."""
        return F.normalize(self.image_projection(states[:, 0]), dim=-1)

    def text_pass(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> MomeEncoderOutput:
        """input_ids (texts, tokens) → states (texts, tokens + 1, width), `[CLS]` last."""
        check_no_other_inputs(kwargs)
        check_input_ids(self.config, input_ids, self.vocabulary)
        ids, order = self._fill(input_ids, text_mask(self.config, input_ids, attention_mask))
        tokens = input_ids.shape[1]
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden_states = self.text_embedding(self.get_input_embeddings()(ids), positions)
        hidden_states = self.text_embedding.with_cls(hidden_states)
        is_filler = F.pad(ids == self.config.filler_token_id, (0, 1))  # [CLS] is none
        seen = ~self.hidden_keys(is_filler)[:, None, None, :]
        seen = seen & seen.new_ones(seen.shape[-1], seen.shape[-1]).tril()  # (texts, 1, tokens, tokens)
        mask = additive_mask(seen, hidden_states.dtype)
        outputs = self.text_encoder(hidden_states, mask, return_dict=True, **all_states(kwargs))
        states = outputs.last_hidden_state
        words = states[:, :tokens]
        if order is not None:  # back to where the caller has them
            words = words.gather(1, order.argsort(dim=1)[..., None].expand(-1, -1, words.shape[-1]))
        outputs["last_hidden_state"] = torch.cat([words, states[:, -1:]], dim=1)
        return _selected(outputs, kwargs)

    def project_text(self, states: torch.Tensor) -> torch.Tensor:
        """States of a text pass (texts, tokens + 1, width) → (texts, projection_dim), L2-normalised."""
        return F.normalize(self.text_projection(self.text_norm(states[:, -1])), dim=-1)

    def _fill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Texts with nothing but filler behind them, at least one if there is room; and the order of their tokens.

        In an exported graph, whose number of tokens is open, there is as much filler as there is room.
        """
        config, order = self.config, None
        if is_exporting():
            is_text = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
            length = config.max_position_embeddings
            return filled_texts(input_ids, is_text, length, config.filler_token_id), None
        if attention_mask is not None:
            order = (attention_mask == 0).long().argsort(dim=1, stable=True)
            is_padding = attention_mask.gather(1, order) == 0
            input_ids = input_ids.gather(1, order).masked_fill(is_padding, config.filler_token_id)
        room = min(config.max_position_embeddings - input_ids.shape[1], 1)
        return F.pad(input_ids, (0, room), value=config.filler_token_id), order

    def hidden_keys(self, is_filler: torch.Tensor) -> torch.Tensor:
        """(texts, tokens) bool → the same: which tokens nobody sees."""
        return is_filler if self.config.correct_cls_mask else F.pad(is_filler, (1, 0))[:, :-1]

    # The public features.

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Image embeddings.

        Args:
            pixel_values: (images, channels, image_size, image_size) float.

        Returns:
            `pooler_output` (images, projection_dim), L2-normalised; `last_hidden_state` (images, queries, width);
            `hidden_states` of the image encoder (images, 1 + patches, vision width).

        Raises:
            ValueError: wrong number of dimensions, channels or pixels.
        """
        outputs = self.image_pass(pixel_values, **kwargs)
        states = outputs.last_hidden_state
        return _features(outputs, states, self.project_image(states))

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Text embeddings.

        Args:
            input_ids: (texts, tokens) int64, `[BOS] words [EOS]`, padded on either side.
            attention_mask: (texts, tokens), 0 where padding; `None`: where `pad_token_id` stands at either end.

        Returns:
            `pooler_output` (texts, projection_dim), L2-normalised; `last_hidden_state` (texts, tokens, width) of the
            words; `hidden_states` of the encoder: padding on the right, a filler token more if there is room, `[CLS]`.

        Raises:
            ValueError: no text, an id beyond the vocabulary, or a text longer than the position table.
        """
        outputs = self.text_pass(input_ids, attention_mask, **kwargs)
        states = outputs.last_hidden_state
        return _features(outputs, states[:, :-1], self.project_text(states))

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
            return_loss: contrastive loss with image i and text i a pair.

        Raises:
            ValueError: as `get_image_features` and `get_text_features`; neither modality given; `return_loss`
                without both or with unequal numbers.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("CocaModel got neither pixel_values nor input_ids: pass at least one")
        if return_loss:
            check_pairs(pixel_values, input_ids)
        if input_ids is not None:
            check_input_ids(self.config, input_ids, self.vocabulary)  # before the image pass, the expensive one
            attention_mask = text_mask(self.config, input_ids, attention_mask)
        features = {}
        if pixel_values is not None:
            features["image"] = self.get_image_features(pixel_values, return_dict=True, **kwargs)
        if input_ids is not None:
            features["text"] = self.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
        logits_per_image = loss = None
        if len(features) == 2:
            logits_per_image = self.similarity(features["image"].pooler_output, features["text"].pooler_output)
        if return_loss:
            loss = contrastive_loss(logits_per_image, same_caption(input_ids, attention_mask))
        only = next(iter(features.values())) if len(features) == 1 else None
        return MomeOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=None if logits_per_image is None else logits_per_image.T,
            text_embeds=features["text"].pooler_output if "text" in features else None,
            image_embeds=features["image"].pooler_output if "image" in features else None,
            last_hidden_state=only and only.last_hidden_state,
            hidden_states=only and only.hidden_states,
            attentions=only and only.attentions,
            image_model_output=features.get("image"),
            text_model_output=features.get("text"),
        )

    def similarity(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """(images, projection_dim), (texts, projection_dim) → (images, texts): cosine times inverse temperature."""
        return image_embeds @ text_embeds.T * self.logit_scale.exp().to(image_embeds.device)

    @property
    def vocabulary(self) -> int | None:
        """Rows of the word embedding, which ids are checked against; `None` if values are not looked at."""
        return self.get_input_embeddings().weight.shape[0] if self.looks_at_values else None


def _selected(outputs: MomeEncoderOutput, options: dict) -> MomeEncoderOutput:
    if outputs.hidden_states is not None:
        outputs["hidden_states"] = asked_for(outputs.hidden_states, options)
    return outputs


def _features(outputs: MomeEncoderOutput, states: torch.Tensor, pooler_output: torch.Tensor) -> MomeFeatures:
    return MomeFeatures(
        last_hidden_state=states,
        pooler_output=pooler_output,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


@dataclass
class CocaCaptionOutput(MomeCaptionOutput):
    """As `MomeCaptionOutput`; the states and attentions are those of the text encoder, then of the decoder.

    Attributes:
        hidden_states: (rows, tokens, width) before each layer and at the end.
        attentions: per layer, (rows, heads, tokens, keys).
        cross_attentions: per layer of the decoder, (rows, heads, tokens, queries but the first).
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None


class CocaForConditionalGeneration(CocaPreTrainedModel, MomeGenerationMixin):
    """Captions images, and trains embeddings and captions together. `input_ids` hold text alone."""

    _auto_class = "AutoModelForImageTextToText"
    drafts_see_image = True
    generation_config_class = MomeGenerationConfig
    _tied_weights_keys = {"lm_head.weight": "model.text_embedding.word_embeddings.weight"}

    def __init__(self, config: CocaConfig):
        super().__init__(config)
        self.model = CocaModel(config)
        self.decoder = CocaDecoder(config)
        self.lm_head = MomeLinear(config.hidden_size, config.vocab_size, bias=False)
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
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    @property
    def logit_scale(self) -> nn.Parameter:
        """(), log of the inverse temperature, as `CocaModel` has it."""
        return self.model.logit_scale

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """See `CocaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """See `CocaModel.get_text_features`."""
        return self.model.get_text_features(input_ids, attention_mask, **kwargs)

    def image_pass_for_captions(self, pixel_values: torch.Tensor, **kwargs) -> MomeEncoderOutput:
        """`CocaModel.image_pass`, and the keys and values of the image in every layer of the decoder."""
        outputs = self.model.image_pass(pixel_values, **kwargs)
        outputs["key_values"] = self.decoder.keys_and_values(outputs.last_hidden_state)
        return outputs

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
    ) -> tuple | CocaCaptionOutput:
        """Next-token logits of captions, and with `labels` the joint loss of the pairs.

        Args:
            input_ids: (rows, tokens) int64.
            pixel_values: (images, channels, image_size, image_size); each image may serve `rows / images` rows.
            attention_mask: (rows, tokens seen so far), 0 where padding; `None`: as in `CaptionInputs`.
            position_ids: (rows, tokens), `[BOS]` is 0.
            cache: what earlier calls have seen, the image included; callers may say `past_key_values`.
            inputs_embeds: (rows, tokens, width), in place of `input_ids`.
            labels: (rows, tokens), as `input_ids`; -100 is ignored. Position t is predicted from those before it.
            use_cache: return what was seen, the image included, for the next call.
            logits_to_keep: logits of the last so many tokens only, or of these positions; 0: all.
            image_tokens_in_input: as MoME has it; `True` is refused, as `input_ids` have no places for an image.
            image_outputs: what `image_pass_for_captions(pixel_values)` gave, in place of another one.

        Raises:
            ValueError: no image, in this call or in the cache; labels of another shape, a text longer than the
                position table, an id beyond the vocabulary, images of a wrong size.
        """
        options = {key: kwargs.pop(key) for key in ("num_items_in_batch", "shift_labels") if key in kwargs}
        self._check(input_ids, inputs_embeds, pixel_values, labels, options, image_tokens_in_input)
        if attention_mask is None and input_ids is not None and (cache is None or not cache.get_seq_length()):
            attention_mask = text_mask(self.config, input_ids, None)
        use_cache = use_cache and labels is None
        if use_cache and cache is None:
            cache = MomeCache(self.config)
        position_ids = self._positions(input_ids, inputs_embeds, attention_mask, position_ids, cache)
        image, key_values = self._image(pixel_values, image_outputs, cache, **kwargs)
        words = input_ids, inputs_embeds, position_ids, attention_mask
        text, caption = self.caption_pass(*words, key_values, cache, **kwargs)
        states, keep = caption.last_hidden_state, logits_to_keep
        logits = self.lm_head(states[:, -keep:] if isinstance(keep, int) else states[:, keep])
        image_embeds = None if image is None else self.model.project_image(image.last_hidden_state)
        parts = input_ids, attention_mask, image_embeds, logits, labels, options
        losses = {} if labels is None else self._losses(*parts)
        return CocaCaptionOutput(
            logits=logits,
            **{CACHE_NAME: cache if use_cache else None},
            hidden_states=asked_for(text.hidden_states and text.hidden_states + caption.hidden_states[1:], kwargs),
            attentions=text.attentions and text.attentions + caption.attentions,
            cross_attentions=caption.cross_attentions,
            image_embeds=image_embeds,
            **losses,
        )

    def _check(self, input_ids, inputs_embeds, pixel_values, labels, options, image_tokens_in_input: bool | None):
        if image_tokens_in_input:
            raise ValueError("image_tokens_in_input=True: CoCa has no places for an image in input_ids, leave it out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds; generate() starts from [BOS] by itself")
        check_labels(labels, input_ids, pixel_values, options)
        if input_ids is not None:
            check_vocabulary(input_ids, self.model.vocabulary)

    def caption_pass(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        key_values: tuple[KeyValues, ...],
        cache: Cache | None,
        **kwargs,
    ) -> tuple[MomeEncoderOutput, MomeEncoderOutput]:
        """Words and an image → states of the text encoder and of the decoder, (rows, tokens, width) each."""
        rows, images = position_ids.shape[0], key_values[0][0].shape[0]
        if not images or rows % images:
            raise ValueError(f"{images} images and {rows} texts: pass one text for each image")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states = self.model.text_embedding(embeds, position_ids)
        is_filler = self._is_filler(input_ids, inputs_embeds)
        text_mask, mask = self._masks(hidden_states, attention_mask, is_filler, cache)
        kwargs = {**all_states(kwargs), "cache": cache, "return_dict": True}
        text = self.model.text_encoder(hidden_states, text_mask, causal=True, **kwargs)
        caption = self.decoder(text.last_hidden_state, key_values, mask, **kwargs)
        if cache is not None:
            cache.image_key_values, cache.num_image_tokens = key_values, key_values[0][0].shape[2]
        return text, caption

    def _image(
        self, pixel_values, image_outputs, cache: Cache | None, **kwargs
    ) -> tuple[MomeEncoderOutput | None, tuple[KeyValues, ...]]:
        """The image of this call, if there is one, and its keys and values or those in the cache."""
        if cached_image_tokens(cache):
            return None, cache.image_key_values
        if image_outputs is None and pixel_values is None:
            raise ValueError("captions are made of images: pass pixel_values, or a cache of a call that had them")
        if image_outputs is None:
            image_outputs = self.image_pass_for_captions(pixel_values, **kwargs)
        return image_outputs, image_outputs.key_values

    def _positions(self, input_ids, inputs_embeds, attention_mask, position_ids, cache: Cache | None) -> torch.Tensor:
        """(rows, tokens): position of each token in its text, padding on the left not counted."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        rows, tokens = given.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is not None:
            positions = position_ids.expand(rows, -1)
            if attention_mask is None or attention_mask.ndim == 2:  # with 4D, the caller says who sees whom
                check_text_positions(positions, None if attention_mask is None else attention_mask[:, -tokens:])
        elif attention_mask is not None and attention_mask.ndim == 2:
            positions = attention_mask.long().cumsum(dim=1)[:, -tokens:] - 1
        else:
            positions = (torch.arange(tokens, device=given.device) + past).expand(rows, -1)
        if not torch.compiler.is_compiling():
            check_positions(self.config, positions, int(past) + tokens)
        return positions.clamp(min=0)

    def _is_filler(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """(rows, tokens) bool"""
        if input_ids is not None:
            return input_ids == self.config.filler_token_id
        filler = self.get_input_embeddings().weight[self.config.filler_token_id]
        return (inputs_embeds == filler.to(inputs_embeds)).all(dim=-1)

    def _masks(
        self, like: torch.Tensor, attention_mask: torch.Tensor | None, is_filler: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Masks of the text encoder and of the decoder: both causal, the first without the keys that are hidden."""
        if attention_mask is not None and attention_mask.ndim == 2:  # padding hides nothing but itself
            is_filler = is_filler & attention_mask[:, -is_filler.shape[1] :].bool()
        given = self.config, like[..., :0], attention_mask, cache
        mask = create_causal_mask(*given)
        if cache is not None:  # one more layer remembers it, whatever the cache does to its rows and tokens
            marks = is_filler[:, None, :, None].to(like.dtype)
            is_filler = cache.update(marks, marks, self.config.num_hidden_layers - 1)[0][:, 0, :, 0] > 0
        hidden = self.model.hidden_keys(is_filler)
        looks = self.model.looks_at_values and not torch.compiler.is_compiling()
        if looks and hidden.device.type != "meta" and not hidden.any():
            return mask, mask
        text_mask = mask
        if mask is None:
            text_mask = self._open_mask(like, hidden.shape[1])
        hidden = hidden[:, None, None, :]
        if text_mask.dtype == torch.bool:
            return text_mask & ~hidden, mask
        return text_mask.masked_fill(hidden, torch.finfo(text_mask.dtype).min), mask

    def _open_mask(self, like: torch.Tensor, keys: int) -> torch.Tensor:
        """(1, 1, tokens, keys): a token sees what is not behind it."""
        seen = torch.ones(like.shape[1], keys, dtype=torch.bool, device=like.device).tril(keys - like.shape[1])
        seen = seen[None, None]
        return seen if self.config._attn_implementation == "sdpa" else additive_mask(seen, like.dtype)

    def _losses(self, input_ids, attention_mask, image_embeds, logits, labels, options) -> dict[str, torch.Tensor]:
        """The joint loss (2205.01917, eq. 4) and its parts, by their names in the output.

        As a part of a batch with `num_items_in_batch` labels, as transformers' `Trainer` passes it, all of them count
        by the share that this call holds: see `label_share`.
        """
        num_items, shift_labels = (options.get(name) for name in ("num_items_in_batch", "shift_labels"))
        if self.model.looks_at_values:
            check_number_of_labels(num_items)
        share = 1.0 if num_items is None else label_share(labels, num_items, shift_labels)
        captions = caption_loss(logits, labels, shift_labels=shift_labels)
        text_embeds = self.get_text_features(input_ids, attention_mask).pooler_output
        logits_per_image = self.model.similarity(image_embeds, text_embeds)
        contrastive = contrastive_loss(logits_per_image, same_caption(input_ids, attention_mask))
        loss = self.config.contrastive_loss_weight * contrastive + self.config.caption_loss_weight * captions
        losses = {"loss": loss, "contrastive_loss": contrastive, "caption_loss": captions}
        return {name: share * each for name, each in losses.items()}

    def _place_image(self, cache: Cache | None, options: MomeGenerationConfig, kwargs: dict) -> int:
        """There is no place for it: it is encoded, and the prompt is made what a caption goes on from.

        Raises:
            ValueError: another number of prompts than images; `position_ids` of another shape than the prompt;
                classifier-free guidance.
        """
        if options.guidance_scale not in (None, 1):
            raise ValueError(
                f"guidance_scale={quoted(options.guidance_scale)} compares with a caption without an image, which "
                "CoCa can't write: use rerank_weight or contrastive_weight"
            )
        pixel_values, ids, embeds = (kwargs.get(name) for name in ("pixel_values", "input_ids", "inputs_embeds"))
        prompt, mask = ids if embeds is None else embeds, kwargs.get("attention_mask")
        if pixel_values is not None and prompt.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"{pixel_values.shape[0]} images and {prompt.shape[0]} prompts: pass one prompt for each image"
            )
        positions = kwargs.get("position_ids")
        positions = None if positions is None else check_position_ids(positions, prompt).expand(prompt.shape[0], -1)
        if embeds is None and (cache is None or not int(cache.get_seq_length())):
            given = ids, mask, positions
            # Padding does not look like the filler any more: masks that are compiled don't show it.
            ids, mask, positions = prepare_prompt(self.config, *given, eos_token_ids(self.config, options))
            kwargs["input_ids"] = ids
        if positions is not None:
            kwargs["position_ids"] = positions
        if pixel_values is not None and not cached_image_tokens(cache):
            # Not left to the first forward: an assistant, and steps without a cache, have it only from here.
            kwargs["image_outputs"] = self.image_pass_for_captions(pixel_values)
        given = ids if embeds is None else embeds[..., 0]
        kwargs["attention_mask"] = torch.ones_like(given).long() if mask is None else mask
        return 0


__all__ = ["CocaForConditionalGeneration", "CocaModel", "CocaPreTrainedModel"]
