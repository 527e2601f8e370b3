"""Captions through the stock `generate()`: where the image goes, how long a caption may be, what is cached.

- `MomeGenerationMixin`: what a captioner adds to transformers' `GenerationMixin`. It puts the image tokens in front of
  a prompt, keeps captions inside the position table, and lets beams and candidates share their image.
"""

import copy

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .captioning_mome import MomeCache, cached_image_tokens, is_image_token, prepare_prompt

logger = logging.get_logger(__name__)


class MomeGenerationMixin(GenerationMixin):
    """`generate()` of `MomeForConditionalGeneration`."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        """Captions, through `GenerationMixin.generate` with all its options.

        Without a prompt a caption starts from `[BOS]`. A prompt may be what the tokenizer returns: `[EOS]` at its end
        is dropped, padding moves to the left. The image is encoded once for all beams and candidates.

        Args:
            inputs: (batch, tokens) prompt; the same as `input_ids`.
            generation_config: as in transformers.
            kwargs: model inputs (`pixel_values`, `input_ids`, `attention_mask`) and generation options. Lengths
                count text tokens, unless `input_ids` already holds the image tokens.

        Returns:
            (batch · num_return_sequences, tokens) ids, prompt included, or a `ModelOutput` that has them as
            `sequences`, as transformers does.

        Raises:
            ValueError: another number of prompts than images, or a prompt that fills the position table. A caption
                that reaches the table's end stops there.
        """
        config, cache = self.config, kwargs.get("past_key_values")
        pixel_values, input_ids = kwargs.get("pixel_values"), kwargs.pop("input_ids", inputs)
        has_image = pixel_values is not None or cached_image_tokens(cache) > 0
        if pixel_values is not None:
            self.model._check_pixel_values(pixel_values)
            if input_ids is None and kwargs.get("inputs_embeds") is None:
                input_ids = torch.full((pixel_values.shape[0], 1), config.bos_token_id, device=pixel_values.device)
        added = 0
        if has_image:
            input_ids, added = self._place_image(input_ids, generation_config, kwargs)
            kwargs["image_tokens_in_input"] = True
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        options, kwargs = self._bound_lengths(has_image, added, generation_config, kwargs)
        outputs = super().generate(None, options, **kwargs)
        if isinstance(outputs, torch.Tensor):
            return outputs[:, added:]
        outputs.sequences = outputs.sequences[:, added:]
        return outputs

    def _place_image(self, input_ids, generation_config, kwargs) -> tuple[torch.Tensor | None, int]:
        """Put the image tokens in front of a prompt without them; returns it and how many ids were added."""
        config, embeds, mask = self.config, kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        pixel_values, cache, tokens = (
            kwargs.get("pixel_values"),
            kwargs.get("past_key_values"),
            config.num_image_tokens,
        )
        prompt = input_ids if embeds is None else embeds
        if pixel_values is not None and prompt.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"{pixel_values.shape[0]} images and {prompt.shape[0]} prompts: pass one prompt for each image"
            )
        image_embedding = self.get_input_embeddings().weight[config.image_token_id]
        if is_image_token(config, image_embedding, input_ids if embeds is None else None, embeds).any():
            return input_ids, 0
        if embeds is None and (cache is None or not int(cache.get_seq_length())):
            eos = (generation_config or self.generation_config).eos_token_id
            eos = config.eos_token_id if eos is None else eos
            input_ids, mask = prepare_prompt(config, input_ids, mask, eos if isinstance(eos, list) else [eos])
        if embeds is not None:
            image = image_embedding.to(embeds).expand(embeds.shape[0], tokens, -1)
            kwargs["inputs_embeds"] = torch.cat([image, embeds], dim=1)
        mask = torch.ones_like(prompt[..., 0] if embeds is not None else input_ids).long() if mask is None else mask
        kwargs["attention_mask"] = F.pad(mask, (tokens, 0), value=1)
        if input_ids is None:  # the ids of generated tokens alone come back
            return None, 0
        return F.pad(input_ids, (tokens, 0), value=config.image_token_id), tokens

    def _bound_lengths(self, has_image, added, generation_config, kwargs) -> tuple[GenerationConfig, dict]:
        """Length options that count the added image tokens and end where the position table does."""
        options = copy.deepcopy(generation_config or self.generation_config)
        longest, kwargs = self.config.max_position_embeddings, options.update(**kwargs)
        ids = 0 if kwargs.get("input_ids") is None else kwargs["input_ids"].shape[1]
        embeds = kwargs.get("inputs_embeds")
        prompt = (ids if embeds is None else embeds.shape[1]) - (self.config.num_image_tokens if has_image else 0)
        room = longest - prompt
        if room < 1:
            raise ValueError(
                f"a prompt of {prompt} tokens leaves no room for a caption: max_position_embeddings is {longest}"
            )
        if options.max_new_tokens is None and options.max_length is None:
            options.max_new_tokens = min(20, room)  # transformers' default
        elif options.max_new_tokens is None:
            options.max_new_tokens = options.max_length + added - ids
        if options.max_new_tokens > room:
            logger.warning_once(f"captions stop after {room} tokens: max_position_embeddings is {longest}")
            options.max_new_tokens = room
        options.max_length = None
        if options.min_length:
            options.min_length += added
        if options.min_new_tokens:
            options.min_new_tokens = min(options.min_new_tokens, room)
        return options, kwargs

    def _get_stopping_criteria(self, *args, **kwargs):
        """transformers warns beyond `max_position_embeddings`, which here leaves out the image."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for each in criteria:
            if getattr(each, "max_position_embeddings", None) is not None:
                each.max_position_embeddings += self.config.num_image_tokens
        return criteria

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """In place of the default cache, one that isn't copied for every token."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if made is not given and type(made) is DynamicCache and not made.offloading:
            model_kwargs["past_key_values"] = MomeCache(self.config)

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args, **kwargs):
        """Beams and candidates share their image: its pixels are not repeated."""
        pixel_values = kwargs.pop("pixel_values", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs


__all__ = ["MomeGenerationMixin"]
