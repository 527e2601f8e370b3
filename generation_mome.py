"""Captions through the stock `generate()`: where the image goes, how long a caption may be, what is cached, guidance.

- `CaptionGuidance`: what guidance adds to one call, and makes of its captions;
- `MomeGenerationMixin`: what a captioner adds to transformers' `GenerationMixin`. It puts the image tokens in front of
  a prompt, keeps captions inside the position table, and lets beams and candidates share their image.
"""

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput, logging

from .captioning_mome import MomeCache, cached_image_tokens, is_image_token, prepare_prompt
from .compatibility_mome import CACHE_NAME, take_cache
from .guidance_mome import (
    CONTRASTIVE_TOP_K,
    CaptionCandidates,
    CaptionPrompt,
    ClassifierFreeGuidance,
    ContrastiveGuidance,
    MomeGenerationConfig,
)

logger = logging.get_logger(__name__)


class CaptionGuidance:
    """One call of `generate()` under guidance: what goes into it, and what is made of its captions.

    Attributes:
        options: the generation config for transformers, which has guidance of its own that must not run as well.
        kwargs: the model inputs, with the image pass and the processors of the guidance.
    """

    def __init__(self, captioner, options: MomeGenerationConfig, has_image: bool, kwargs: dict):
        self.captioner, self.options, self.kwargs = captioner, options, kwargs
        self.scale = 1.0 if options.guidance_scale is None else options.guidance_scale
        options.guidance_scale = 1.0
        self.prompt = self.image_outputs = self.image_embeds = None
        if kwargs.get("negative_prompt_ids") is not None:
            raise ValueError("negative_prompt_ids has no use here: guidance is against the caption without its image")
        # Without an image, p(y|x) is p(y), and classifier-free guidance changes nothing.
        guides = has_image and self.scale != 1
        if options.needs_image_embeds or guides:
            if kwargs.get("input_ids") is None:
                raise ValueError("guidance reads the text of the prompt: pass input_ids beside inputs_embeds")
            self.prompt = CaptionPrompt(captioner.config, kwargs["input_ids"], kwargs.get("attention_mask"))
        if options.needs_image_embeds:
            self._encode_image()
        if options.reranks:
            self._ask_for_candidates()
        if options.output_cosine:
            options.return_dict_in_generate = True
        self._add_processors(guides)

    def _encode_image(self):
        pixel_values = self.kwargs.get("pixel_values")
        if pixel_values is None:
            raise ValueError("re-ranking, contrastive guidance and output_cosine need the image: pass pixel_values")
        wanted = {name: getattr(self.options, name) for name in ("output_attentions", "output_hidden_states")}
        wanted = {name: value for name, value in wanted.items() if value}
        self.image_outputs = self.captioner.model.image_pass(pixel_values, return_key_values=True, **wanted)
        self.image_embeds = self.captioner.model._image_embeds(self.image_outputs).float()
        self.kwargs["image_outputs"] = self.image_outputs

    def _ask_for_candidates(self):
        options = self.options
        self.wanted = options.num_return_sequences or 1
        candidates = int(options.rerank_candidates or self.wanted)
        if candidates < self.wanted:
            raise ValueError(
                f"rerank_candidates={candidates} is less than num_return_sequences={self.wanted}: ask for as many"
            )
        beams = options.num_beams or 1
        if beams == 1 and not options.do_sample:
            options.num_beams = candidates
        elif 1 < beams < candidates:
            raise ValueError(f"num_beams={beams} gives no rerank_candidates={candidates}: raise num_beams")
        options.num_return_sequences = candidates

    def _add_processors(self, guides: bool):
        processors = LogitsProcessorList()
        if guides:
            processors.append(ClassifierFreeGuidance(self.captioner, self.prompt, self.scale))
        if self.options.contrastive_weight:
            processors.append(
                ContrastiveGuidance(
                    self.captioner,
                    self.prompt,
                    self.image_embeds,
                    self.options.contrastive_weight,
                    int(self.options.contrastive_top_k or CONTRASTIVE_TOP_K),
                    self.captioner._eos_token_ids(self.options),
                )
            )
        if processors:
            self.kwargs["logits_processor"] = processors + list(self.kwargs.get("logits_processor") or [])

    def finish(self, outputs):
        """Re-ranks and adds the cosines, where that was asked for."""
        options = self.options
        if not (options.reranks or options.output_cosine):
            return outputs
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        pad = options.pad_token_id
        pad = self.captioner.config.pad_token_id if pad is None else pad
        eos = self.captioner._eos_token_ids(options)
        candidates = CaptionCandidates(self.captioner, self.prompt, sequences, eos, pad)
        cosines = candidates.cosines(self.image_embeds)
        if not options.reranks:
            outputs["cosine"] = cosines
            return outputs
        log_probabilities = candidates.log_probabilities(self.kwargs["pixel_values"], self.image_outputs)
        scores = candidates.scores(log_probabilities, cosines, options)
        best = scores.view(-1, options.num_return_sequences).argsort(dim=1, descending=True, stable=True)
        first = torch.arange(best.shape[0], device=best.device)[:, None] * options.num_return_sequences
        rows = (first + best[:, : self.wanted]).flatten()
        if isinstance(outputs, torch.Tensor):
            return outputs[rows]
        self._select(outputs, rows)
        outputs["rerank_scores"] = scores[rows]
        outputs["candidate_indices"] = rows
        if options.output_cosine:
            outputs["cosine"] = cosines[rows]
        return outputs

    def _select(self, outputs: ModelOutput, rows: torch.Tensor):
        """Keeps the chosen captions, and of what has a row for each caption their rows."""
        for name in ("sequences", "sequences_scores", "beam_indices"):
            if outputs.get(name) is not None:
                outputs[name] = outputs[name][rows]
        if outputs.get("beam_indices") is None:  # of beams, a step's scores have a row for each beam
            for name in ("scores", "logits"):
                if outputs.get(name) is not None:
                    outputs[name] = tuple(step[rows] for step in outputs[name])


class MomeGenerationMixin(GenerationMixin):
    """`generate()` of `MomeForConditionalGeneration`."""

    def adjust_generation_fn(self, *args, **kwargs):
        """transformers reads `generation_config.json` into its own class."""
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = MomeGenerationConfig.of(self.generation_config)

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ):
        """Captions, through `GenerationMixin.generate` with all its options and those of `MomeGenerationConfig`.

        Without a prompt a caption starts from `[BOS]`. A prompt may be what the tokenizer returns: `[EOS]` at its end
        is dropped, padding moves to the left. The image is encoded once for all beams, candidates and guidance.

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
                without what it needs. A caption that reaches the table's end stops there.
        """
        config, cache = self.config, take_cache(kwargs)
        pixel_values, input_ids = kwargs.get("pixel_values"), kwargs.pop("input_ids", inputs)
        kwargs.pop("image_outputs", None)  # an assistant gets those of the model it assists
        has_image = pixel_values is not None or cached_image_tokens(cache) > 0
        if pixel_values is not None:
            self.model._check_pixel_values(pixel_values)
            if input_ids is None and kwargs.get("inputs_embeds") is None:
                input_ids = torch.full((pixel_values.shape[0], 1), config.bos_token_id, device=pixel_values.device)
        options, kwargs = self._merge_options(generation_config, kwargs)
        added = 0
        if has_image:
            input_ids, added = self._place_image(input_ids, cache, options, kwargs)
            kwargs["image_tokens_in_input"] = True
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        self._bound_lengths(has_image, added, options, kwargs)
        guidance = CaptionGuidance(self, options, has_image, kwargs)
        outputs = guidance.finish(super().generate(None, guidance.options, **guidance.kwargs))
        if isinstance(outputs, torch.Tensor):
            return outputs[:, added:]
        outputs.sequences = outputs.sequences[:, added:]
        return outputs

    def _merge_options(self, generation_config, kwargs) -> tuple[MomeGenerationConfig, dict]:
        """Options as transformers ranks them (arguments, `generation_config`, the checkpoint's); other arguments."""
        own = MomeGenerationConfig.of(self.generation_config).to_dict()
        given = {} if generation_config is None else MomeGenerationConfig.of(generation_config).to_dict()
        given = {key: value for key, value in given.items() if value is not None and not key.startswith("_")}
        asked = {key: value for key, value in kwargs.items() if value is not None}
        lengths = given.keys() | asked.keys()
        if "max_length" in lengths and "max_new_tokens" not in lengths:
            own["max_new_tokens"] = None  # the checkpoint's, which would win
        options = MomeGenerationConfig()
        for key, value in (own | given).items():
            setattr(options, key, value)
        return options, options.update(**asked)

    def _place_image(self, input_ids, cache, options, kwargs) -> tuple[torch.Tensor | None, int]:
        """Put the image tokens in front of a prompt without them; returns it and how many ids were added."""
        config, embeds, mask = self.config, kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        pixel_values, tokens = kwargs.get("pixel_values"), config.num_image_tokens
        prompt = input_ids if embeds is None else embeds
        if pixel_values is not None and prompt.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"{pixel_values.shape[0]} images and {prompt.shape[0]} prompts: pass one prompt for each image"
            )
        image_embedding = self.get_input_embeddings().weight[config.image_token_id]
        if is_image_token(config, image_embedding, input_ids if embeds is None else None, embeds).any():
            return input_ids, 0
        if embeds is None and (cache is None or not int(cache.get_seq_length())):
            input_ids, mask = prepare_prompt(config, input_ids, mask, self._eos_token_ids(options))
        if embeds is not None:
            image = image_embedding.to(embeds).expand(embeds.shape[0], tokens, -1)
            kwargs["inputs_embeds"] = torch.cat([image, embeds], dim=1)
        mask = torch.ones_like(prompt[..., 0] if embeds is not None else input_ids).long() if mask is None else mask
        kwargs["attention_mask"] = F.pad(mask, (tokens, 0), value=1)
        if input_ids is None:  # the ids of generated tokens alone come back
            return None, 0
        return F.pad(input_ids, (tokens, 0), value=config.image_token_id), tokens

    def _eos_token_ids(self, options: MomeGenerationConfig) -> list[int]:
        eos = self.config.eos_token_id if options.eos_token_id is None else options.eos_token_id
        return list(eos) if isinstance(eos, (list, tuple)) else [eos]

    def _bound_lengths(self, has_image, added, options, kwargs):
        """Length options that count the added image tokens and end where the position table does."""
        longest = self.config.max_position_embeddings
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
        """In place of the default cache, one that isn't copied for every token."""
        given = model_kwargs.get(CACHE_NAME)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE_NAME)
        if made is not given and type(made) is DynamicCache and not made.offloading:
            model_kwargs[CACHE_NAME] = MomeCache(self.config)

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args, **kwargs):
        """Beams and candidates share their image: its pixels are not repeated."""
        pixel_values = kwargs.pop("pixel_values", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs


__all__ = ["MomeGenerationMixin"]
