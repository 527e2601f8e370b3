"""Captions through the stock `generate()`: where the image goes, how long a caption may be, what is cached.

    options ─ prompt, image placed ─ lengths ─ guidance ─ transformers' generate() ─ guidance: best first ─ captions

`MomeGenerationMixin` is what a captioner adds to transformers' `GenerationMixin`: it puts the image tokens in front of
a prompt, keeps captions inside the position table, and lets beams and candidates share their image.
"""

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.utils import logging

from .captioning_mome import MomeCache, MomeStaticLayer, cached_image_tokens, is_image_token, prepare_prompt
from .compatibility_mome import CACHE_NAME, take_cache
from .configuration_mome import quoted
from .guidance_mome import CaptionGuidance, ClassifierFreeGuidance, MomeGenerationConfig, eos_token_ids
from .inputs_mome import check_ids, check_pixel_values, check_position_ids, is_count

logger = logging.get_logger(__name__)


class MomeGenerationMixin(GenerationMixin):
    """`generate()` of `MomeForConditionalGeneration`."""

    # Whether a draft model that transformers calls sees the image as well.
    drafts_see_image = False

    def adjust_generation_fn(self, *args, **kwargs):
        """transformers reads `generation_config.json` into its own class."""
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = MomeGenerationConfig.of(self.generation_config)

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ):
        """Captions, through `GenerationMixin.generate` with all its options and those of `MomeGenerationConfig`.

        Without a prompt a caption starts from `[BOS]`. A prompt may be what the tokenizer returns: padding moves to
        the left, and so does `[EOS]` at its end, as padding; what is generated starts behind as many columns as the
        prompt has. The image is encoded once for all beams, candidates and guidance.

        Args:
            inputs: (batch, tokens) prompt; the same as `input_ids`.
            generation_config: as in transformers, or a `MomeGenerationConfig`.
            kwargs: model inputs (`pixel_values`, `input_ids`, `attention_mask`) and generation options. Lengths
                count text tokens, unless `input_ids` already holds the image tokens.

        Returns:
            (batch · num_return_sequences, tokens) ids, prompt included, or a `ModelOutput` that has them as
            `sequences`, as transformers does. With re-ranking the captions of an image come best first, and the
            `ModelOutput` also has, (batch · num_return_sequences,) each: `rerank_scores`, and `candidate_indices`,
            the rows of `cache`, `hidden_states` and `attentions`, which stay in order of the candidates.
            With `output_cosine`, `cosine` as well.

        Raises:
            ValueError: another number of prompts than images, or a prompt that fills the position table; guidance
                without what it needs; a draft model for an image, which it would not see; `position_ids` that start
                again within a row. A caption that reaches the table's end stops there.
        """
        cache = take_cache(kwargs)
        has_image = kwargs.get("pixel_values") is not None or cached_image_tokens(cache) > 0
        options, kwargs = self._merge_options(generation_config, self._with_prompt(inputs, kwargs))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        if has_image:
            self._check_drafts(options, kwargs)
        added = self._place_image(cache, options, kwargs) if has_image else 0
        self._bound_lengths(has_image, added, options, kwargs)
        guidance = CaptionGuidance(self, options, has_image, kwargs)
        outputs = super().generate(None, guidance.options, **guidance.kwargs)
        outputs = guidance.finish(outputs)
        if isinstance(outputs, torch.Tensor):
            return outputs[:, added:]
        outputs.sequences = outputs.sequences[:, added:]
        return outputs

    def _with_prompt(self, inputs: torch.Tensor | None, kwargs: dict) -> dict:
        """The arguments with a prompt as `input_ids` (batch, tokens): `[BOS]` for each image where there is none."""
        kwargs.pop("image_outputs", None)  # an assistant gets those of the model it assists
        pixel_values, input_ids = kwargs.get("pixel_values"), kwargs.pop("input_ids", inputs)
        if input_ids is not None:
            check_ids(input_ids)
        if pixel_values is not None:
            check_pixel_values(self.config, pixel_values)
            if input_ids is None and kwargs.get("inputs_embeds") is None:
                bos = self.config.bos_token_id
                input_ids = torch.full((pixel_values.shape[0], 1), bos, device=pixel_values.device)
        return kwargs if input_ids is None else {**kwargs, "input_ids": input_ids}

    def _merge_options(self, generation_config, kwargs) -> tuple[MomeGenerationConfig, dict]:
        """Options as transformers ranks them (arguments, `generation_config`, the checkpoint's); other arguments."""
        own = MomeGenerationConfig.of(self.generation_config).to_dict()
        given = {} if generation_config is None else MomeGenerationConfig.of(generation_config).to_dict()
        given = {key: value for key, value in given.items() if value is not None and not key.startswith("_")}
        asked = {key: value for key, value in kwargs.items() if value is not None}
        lengths = given.keys() | asked.keys()
        if "max_length" in lengths and "max_new_tokens" not in lengths:
            own["max_new_tokens"] = None  # the checkpoint's, which would win
        for name in lengths & {"max_new_tokens", "max_length"}:
            if not is_count(value := asked.get(name, given.get(name))):
                raise ValueError(f"{name}={quoted(value)} must be an integer of at least 1")
        options = MomeGenerationConfig()
        for key, value in (own | given).items():
            setattr(options, key, value)
        return options, options.update(**asked)

    def _check_drafts(self, options: MomeGenerationConfig, kwargs: dict):
        """transformers hands the ids to a draft model, but no image: no draft would be accepted."""
        refused = {"assistant_early_exit"} | (set() if self.drafts_see_image else {"assistant_model"})
        for name in sorted(refused):
            if kwargs.get(name) is not None or getattr(options, name, None) is not None:
                raise ValueError(
                    f"{name} drafts captions without seeing the image: leave it out, or pass prompt_lookup_num_tokens"
                )

    def _place_image(self, cache: Cache | None, options: MomeGenerationConfig, kwargs: dict) -> int:
        """Puts the image tokens in front of a prompt without them; returns how many ids were added."""
        config, tokens = self.config, self.config.num_image_tokens
        names = ("pixel_values", "input_ids", "inputs_embeds", "attention_mask", "position_ids")
        pixel_values, input_ids, embeds, mask, positions = (kwargs.get(name) for name in names)
        kwargs["image_tokens_in_input"] = True
        prompt = input_ids if embeds is None else embeds
        if pixel_values is not None and prompt.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"{pixel_values.shape[0]} images and {prompt.shape[0]} prompts: pass one prompt for each image"
            )
        positions = None if positions is None else check_position_ids(positions, prompt).expand(prompt.shape[0], -1)
        image_embedding = self.get_input_embeddings().weight[config.image_token_id]
        if is_image_token(config, image_embedding, input_ids if embeds is None else None, embeds).any():
            return 0
        if embeds is not None:
            image = image_embedding.to(embeds).expand(embeds.shape[0], tokens, -1)
            kwargs["inputs_embeds"] = torch.cat([image, embeds], dim=1)
        elif cache is None or not int(cache.get_seq_length()):
            prompt = input_ids, mask, positions
            input_ids, mask, positions = prepare_prompt(config, *prompt, eos_token_ids(config, options))
        if positions is not None:  # those of the image, then the text's behind them
            image = torch.arange(tokens, device=positions.device).expand(positions.shape[0], -1)
            kwargs["position_ids"] = torch.cat([image, positions + tokens], dim=1)
        mask = torch.ones_like(embeds[..., 0] if embeds is not None else input_ids).long() if mask is None else mask
        kwargs["attention_mask"] = F.pad(mask, (tokens, 0), value=1)
        if input_ids is None:  # the ids of generated tokens alone come back
            return 0
        kwargs["input_ids"] = F.pad(input_ids, (tokens, 0), value=config.image_token_id)
        return tokens

    def _bound_lengths(self, has_image, added, options, kwargs):
        """Length options that count the added image tokens and end where the position table does."""
        longest = self.config.max_position_embeddings
        ids = 0 if kwargs.get("input_ids") is None else kwargs["input_ids"].shape[1]
        embeds = kwargs.get("inputs_embeds")
        prompt, mask = ids if embeds is None else embeds.shape[1], kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:  # padding has no positions
            prompt = int(mask.sum(dim=1).max())
        prompt -= self.config.num_image_tokens if has_image else 0
        room = longest - prompt
        if room < 1:
            raise ValueError(
                f"a prompt of {prompt} tokens leaves no room for a caption: max_position_embeddings is {longest}"
            )
        if options.max_new_tokens is None and options.max_length is None:
            options.max_new_tokens = min(20, room)  # transformers' default
        elif options.max_new_tokens is None:
            options.max_new_tokens = options.max_length + added - ids
            if options.max_new_tokens < 1:
                raise ValueError(
                    f"max_length={options.max_length} counts the prompt, which has {ids - added} tokens: pass more, "
                    "or max_new_tokens"
                )
        if options.max_new_tokens > room:
            logger.warning_once(f"captions stop after {room} tokens: max_position_embeddings is {longest}")
            options.max_new_tokens = room
        options.max_length = None
        if options.min_length:
            options.min_length += added
        if options.min_new_tokens:
            options.min_new_tokens = min(options.min_new_tokens, room)

    def _get_logits_processor(self, *args, **kwargs):
        """Guides the model's own distribution, before anything forbids or penalises a token."""
        processors = super()._get_logits_processor(*args, **kwargs)
        return type(processors)(sorted(processors, key=lambda each: not isinstance(each, ClassifierFreeGuidance)))

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        """Once the cache holds the image, its states are not needed any more."""
        if model_kwargs.get("use_cache", True):
            model_kwargs.pop("image_outputs", None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _get_stopping_criteria(self, *args, **kwargs):
        """transformers warns beyond `max_position_embeddings`, which here leaves out the image."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for each in criteria:
            if getattr(each, "max_position_embeddings", None) is not None:
                each.max_position_embeddings += self.config.num_image_tokens
        return criteria

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """In place of the default cache, one that isn't copied for every token; static ones that can be frozen."""
        given = model_kwargs.get(CACHE_NAME)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE_NAME)
        if made is not given and type(made) is DynamicCache and not made.offloading:
            model_kwargs[CACHE_NAME] = MomeCache(self.config)
        elif self.device.type == "cpu" and any(type(layer) is StaticLayer for layer in getattr(made, "layers", ())):
            is_plain = [type(layer) is StaticLayer for layer in made.layers]
            made.layers = [
                MomeStaticLayer.in_place_of(each) if plain else each for plain, each in zip(is_plain, made.layers)
            ]

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args, **kwargs):
        """Beams and candidates share their image: its pixels are not repeated."""
        pixel_values = kwargs.pop("pixel_values", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs


__all__ = ["MomeGenerationMixin"]
