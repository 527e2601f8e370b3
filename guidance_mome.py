"""Guided captions: what steers `generate()` towards captions that fit their image.

- `MomeGenerationConfig`: transformers' generation config with the fields of guidance;
- `ClassifierFreeGuidance`, `ContrastiveGuidance`: what changes the scores of the next token;
- `CaptionCandidates`: whole captions, their fluency and their fit, for re-ranking;
- `CaptionGuidance`: what guidance adds to one call of `generate()`, and makes of its captions;
- `GUIDANCE_PRESETS`: a setting of each method to start from.

    classifier-free   log p(y) + γ [log p(y|x) − log p(y)]                 one image-free pass a step
    contrastive       log p(y|x) + β softmax_k(cos(x, y) / temperature)    k text passes a step
    re-ranking        (1 − λ) log p(y|x) / |y|^α + λ τ cos(x, y)           one caption and one text pass at the end

x is the image, y a caption, cos(x, y) the cosine of their embeddings. All three go with beams, sampling, batches and
each other, and the image is encoded once for all of them. A neutral value (γ = 1, β = 0, λ = 0) costs nothing.

**The image-free model.** log p(y) is the caption pass without an image, `captioner(input_ids, attention_mask=mask)`:
`[BOS]` has text position 0 as always, there are no image tokens and nothing stands for them. It means something only
if the model was trained to be one: leave the image out of a share of the captions (10 % or so) and take their caption
loss from that same pass. Hiding the image tokens of a row from all its caption tokens, text positions unchanged, is
the same.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput

from .captioning_mome import is_image_token
from .configuration_mome import MomeConfig, did_you_mean, quoted
from .inputs_mome import text_tokens

GUIDANCE_PRESETS: dict[str, dict[str, Any]] = {
    "none": {"guidance_scale": 1.0, "contrastive_weight": 0.0, "rerank_weight": 0.0},
    "classifier-free": {"guidance_scale": 2.0},
    "contrastive": {"contrastive_weight": 2.0},
    "rerank": {"rerank_weight": 0.5, "rerank_candidates": 4},
}

CONTRASTIVE_TOP_K = 10  # unless a config says otherwise


class MomeGenerationConfig(GenerationConfig):
    r"""transformers' `GenerationConfig` and the fields of guidance.

    As in transformers, what is `None` is taken from the checkpoint's `generation_config.json`, then from the defaults.

    Args:
        guidance_scale: γ of classifier-free guidance (2307.16686): log p(y) + γ [log p(y|x) − log p(y)] for the next
            token, with the caption pass without an image as p(y). Default 1: no guidance. The checkpoint must have
            been trained with image dropout.
        contrastive_weight: β of stepwise contrastive guidance (MAGIC, 2205.02655, eq. 5 without its degeneration
            penalty): β times a softmax over the `contrastive_top_k` likeliest next tokens is added to their scores,
            of the contrastive logits between the image and the caption that each would make. Default 0: no guidance.
        contrastive_top_k: k of stepwise contrastive guidance; every step embeds k captions per beam. Default 10.
        rerank_weight: λ of re-ranking, 0 to 1: candidates are ordered by
            (1 − λ) log p(y|x) / |y|^`length_penalty` + λ τ cos(x, y), best first. Default 0: no re-ranking.
        rerank_scale: τ of re-ranking. Default: the model's inverse temperature, exp(logit_scale).
        rerank_candidates: how many candidates per image are generated, of which the best `num_return_sequences` are
            returned. Default: `num_return_sequences`. Without sampling and without `num_beams`, as many beams.
        output_cosine: return the cosine of every caption and its image as `cosine`, beside `sequences`.
        kwargs: the fields of `GenerationConfig`.

    Raises:
        ValueError: a value that can't be, named.
    """

    # As defaults of the class, they are fields for `update()` and no more in a file than what is set: transformers
    # compares with its own class, field by field.
    contrastive_weight: float | None = None
    contrastive_top_k: int | None = None
    rerank_weight: float | None = None
    rerank_scale: float | None = None
    rerank_candidates: int | None = None
    output_cosine: bool | None = None

    @classmethod
    def from_model_config(cls, model_config) -> "MomeGenerationConfig":
        config = super().from_model_config(model_config)
        # A file that says where its config came from is read without the fields that transformers doesn't know.
        config._from_model_config = None
        return config

    @classmethod
    def of(cls, config: GenerationConfig) -> "MomeGenerationConfig":
        """The same settings in this class."""
        if type(config) is cls:
            return config
        typed = cls(**{**config.to_dict(), "_from_model_config": None})
        if hasattr(config, "_original_object_hash"):
            # transformers compares: has anyone changed the config since it was made?
            typed._original_object_hash = hash(typed)
        return typed

    def validate(self, *args, **kwargs):
        """As `GenerationConfig.validate`, and of the fields of guidance."""
        for name, lowest, highest in (
            ("guidance_scale", 0, math.inf),
            ("contrastive_weight", 0, math.inf),
            ("rerank_weight", 0, 1),
            ("rerank_scale", 0, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and lowest <= value <= highest and value < math.inf):
                bound = f"from {lowest} to {highest}" if highest < math.inf else f"of at least {lowest}"
                raise ValueError(f"{name}={quoted(value)} must be a number {bound}")
        for name in ("contrastive_top_k", "rerank_candidates"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value == int(value) and value >= 1):
                raise ValueError(f"{name}={quoted(value)} must be an integer of at least 1")
        if self.output_cosine not in (None, True, False):
            raise ValueError(f"output_cosine={quoted(self.output_cosine)} must be True or False")
        beams = self.num_beams
        if self.reranks and not self.do_sample and (beams or 1) == 1:
            self.num_beams = self.num_return_sequences  # re-ranking will ask for as many
        try:
            super().validate(*args, **kwargs)
        finally:
            self.num_beams = beams

    @property
    def reranks(self) -> bool:
        return bool(self.rerank_weight)

    @property
    def needs_image_embeds(self) -> bool:
        return bool(self.contrastive_weight or self.rerank_weight or self.output_cosine)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def guidance_options(guidance: str | Iterable[str] | dict[str, Any] | None) -> dict[str, Any]:
    """What `guidance=` of the captioning pipeline stands for, as options of `generate()`.

    Args:
        guidance: a name of `GUIDANCE_PRESETS`, several of them, fields of `MomeGenerationConfig` as a dict, or `None`
            for what the checkpoint has by default.

    Raises:
        ValueError: no such name or field.
    """
    if guidance is None:
        return {}
    if isinstance(guidance, dict):
        fields = [
            *(key for preset in GUIDANCE_PRESETS.values() for key in preset),
            "contrastive_top_k",
            "rerank_scale",
        ]
        for name in guidance:
            _check_choice("field of guidance", name, list(dict.fromkeys(fields)))
        MomeGenerationConfig(**guidance)  # checks the values
        return dict(guidance)
    if not isinstance(guidance, Iterable):
        raise ValueError(f"guidance={quoted(guidance)}: pass a name, several in a list, or fields in a dict")
    options = {}
    for name in [guidance] if isinstance(guidance, str) else guidance:
        _check_choice("guidance", name, list(GUIDANCE_PRESETS))
        options |= GUIDANCE_PRESETS[name]
    return options


def _check_choice(what: str, name: Any, choices: list[str]):
    if name not in choices:
        hint = did_you_mean(name, choices, f"choose from {', '.join(choices)}")
        raise ValueError(f"unknown {what} {quoted(name)}: {hint}")


# ------------------------------------------------------------------------------------------- texts from input_ids


class CaptionPrompt:
    """The text that captions go on from, without image tokens.

    Beams change places only within their image and share its prompt, so that nothing here has to move with them.

    Attributes:
        ids, mask: (batch, tokens), padded on the left.
        length: tokens of the prompt in `input_ids`, image tokens and padding included.
    """

    def __init__(self, config: MomeConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None):
        is_text = ~is_image_token(config, None, input_ids, None)
        if attention_mask is not None:
            is_text &= attention_mask[:, -input_ids.shape[1] :].bool()
        order = is_text.long().argsort(dim=1, stable=True)
        width = int(is_text.sum(dim=1).max())
        order = order[:, order.shape[1] - width :]
        self.config, self.length = config, input_ids.shape[1]
        self.ids, self.mask = input_ids.gather(1, order), is_text.gather(1, order).long()

    def followed_by(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, new tokens) → (rows, tokens) ids and mask of prompt and new tokens; rows of an image in a row."""
        mask = torch.ones_like(ids) if mask is None else mask.long()
        repeats = ids.shape[0] // self.ids.shape[0]
        prompt = (each.to(ids.device).repeat_interleave(repeats, dim=0) for each in (self.ids, self.mask))
        return tuple(torch.cat(pair, dim=1) for pair in zip(prompt, (ids, mask)))

    def so_far(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` (rows, tokens) of a step of `generate()` → ids and mask of its text."""
        return self.followed_by(input_ids[:, self.length :])


def embed_captions(captioner, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(captions, tokens) `[BOS] words [EOS]` → (captions, projection_dim) float32; an `[EOS]` too many is left out."""
    ids, mask = text_tokens(captioner.config, ids, mask)
    if mask is None:  # of fixed length
        return captioner.get_text_features(ids).pooler_output.float()
    longest = captioner.config.max_position_embeddings
    embeds = captioner.get_text_features(ids[:, :longest], attention_mask=mask[:, :longest]).pooler_output
    return embeds.float()


def closing_token_id(config: MomeConfig, eos_token_ids: list[int]) -> int | None:
    """What closes a text that is embedded: the model's `[EOS]`, its first one, or that of the options; or nothing."""
    own = config.eos_token_id
    own = own[0] if isinstance(own, (list, tuple)) and own else own
    return own if isinstance(own, int) else next(iter(eos_token_ids), None)


# ------------------------------------------------------------------------------------------------ step by step


class ClassifierFreeGuidance(LogitsProcessor):
    """log p(y) + γ [log p(y|x) − log p(y)] (2307.16686, eq. 3), not normalised again.

    A beam adds it up over its caption, which so gets the formula of the whole caption. It looks at complete
    `input_ids` and keeps nothing between steps.
    """

    def __init__(self, captioner, prompt: CaptionPrompt, scale: float):
        self.captioner, self.prompt, self.scale = captioner, prompt, scale

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids (rows, tokens), scores (rows, vocabulary): logits or log-probabilities."""
        ids, mask = self.prompt.so_far(input_ids)
        outputs = self.captioner(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
        free = outputs.logits[:, -1].to(scores).log_softmax(dim=-1)
        return free + self.scale * (scores.log_softmax(dim=-1) - free)


class ContrastiveGuidance(LogitsProcessor):
    """Adds β softmax(contrastive logits) to the scores of the k likeliest tokens (MAGIC, 2205.02655, eq. 5).

    The other tokens get nothing, and so stay behind the k: greedy decoding chooses among the k as in the paper, and
    beams and sampling never run out of tokens. A candidate is embedded as a complete text, `[BOS] … token [EOS]`, as
    texts were in training.
    """

    def __init__(
        self,
        captioner,
        prompt: CaptionPrompt,
        image_embeds: torch.Tensor,
        weight: float,
        top_k: int,
        eos_token_ids: list[int],
    ):
        self.captioner, self.prompt, self.image_embeds = captioner, prompt, image_embeds
        self.weight, self.top_k, self.eos_token_ids = weight, top_k, eos_token_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids (rows, tokens), scores (rows, vocabulary): logits or log-probabilities."""
        rows, k = scores.shape[0], min(self.top_k, scores.shape[1])
        likeliest = scores.topk(k, dim=1)
        ids, mask = self.prompt.so_far(input_ids)
        # (rows, tokens) and (rows, k) → (rows · k, tokens + 1), then [EOS] where the candidate isn't one
        candidates = likeliest.indices.reshape(-1, 1)
        ids = torch.cat([ids.repeat_interleave(k, dim=0), candidates], dim=1)
        mask = F.pad(mask.repeat_interleave(k, dim=0), (0, 1), value=1)
        ends = torch.isin(candidates, torch.tensor(self.eos_token_ids, dtype=torch.long, device=ids.device))
        closing = closing_token_id(self.captioner.config, self.eos_token_ids)
        if closing is not None:
            ids = F.pad(ids, (0, 1), value=closing)
            mask = torch.cat([mask, (~ends).long()], dim=1)
        text_embeds = embed_captions(self.captioner, ids, mask).view(rows, k, -1)
        image_embeds = self.image_embeds.repeat_interleave(rows // self.image_embeds.shape[0], dim=0)
        cosines = (text_embeds @ image_embeds[:, :, None]).squeeze(2)
        logits = cosines * self.captioner.model.logit_scale.float().exp()
        # What another processor has ruled out takes no share.
        logits = logits.to(scores).masked_fill(likeliest.values == -math.inf, -math.inf)
        return scores.scatter_add(1, likeliest.indices, self.weight * logits.softmax(dim=1).nan_to_num())


# ---------------------------------------------------------------------------------------------- whole captions


class CaptionCandidates:
    """Finished captions: how fluent they are, and how well they fit their image.

    Attributes:
        is_caption: (candidates, new tokens) bool: the tokens that were generated, up to the first `[EOS]`.
        ids, mask: (candidates, tokens) of the complete text: prompt, caption, `[EOS]`.
    """

    def __init__(
        self, captioner, prompt: CaptionPrompt, sequences: torch.Tensor, eos_token_ids: list[int], pad_token_id: int
    ):
        new = sequences[:, prompt.length :]
        is_eos = torch.isin(new, torch.tensor(eos_token_ids, dtype=torch.long, device=new.device))
        ended = is_eos.any(dim=1, keepdim=True)
        behind_eos = is_eos.long().cumsum(dim=1) - is_eos.long() > 0
        # Without [EOS], a caption that another criterion stopped has padding up to the longest of the batch.
        behind_last = (new != pad_token_id).flip(1).cumsum(dim=1).flip(1) == 0
        self.captioner, self.prompt = captioner, prompt
        self.is_caption = ~torch.where(ended, behind_eos, behind_last)
        lengths = self.is_caption.sum(dim=1, keepdim=True)
        closed = F.pad(new, (0, 1), value=pad_token_id)
        closing = closing_token_id(captioner.config, eos_token_ids)
        added = (~ended).long() * (closing is not None)
        closing = torch.where(ended, closed.gather(1, lengths), pad_token_id if closing is None else closing)
        closed = closed.scatter(1, lengths, closing)
        position = torch.arange(closed.shape[1], device=closed.device)
        self.ids, self.mask = prompt.followed_by(closed, position < lengths + added)

    def cosines(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """image_embeds (images, projection_dim), L2-normalised → (candidates,) cosines of image and caption."""
        text_embeds = embed_captions(self.captioner, self.ids, self.mask)
        repeats = text_embeds.shape[0] // image_embeds.shape[0]
        return (text_embeds * image_embeds.repeat_interleave(repeats, dim=0)).sum(dim=1)

    def log_probabilities(self, pixel_values: torch.Tensor, image_outputs) -> torch.Tensor:
        """(candidates,): log p(y|x), the sum over the tokens that were generated, `[EOS]` counted if there is one."""
        # The last token of the text predicts nothing, and the one before it only the [EOS] that closes a caption.
        logits = self.captioner(
            input_ids=self.ids[:, :-2],
            attention_mask=self.mask[:, :-2],
            pixel_values=pixel_values,
            image_outputs=image_outputs,
            image_tokens_in_input=False,
            use_cache=False,
        ).logits
        new = self.is_caption.shape[1]
        log_probabilities = logits[:, -new:].float().log_softmax(dim=-1)
        tokens = self.ids[:, -new - 1 : -1, None]
        return (log_probabilities.gather(2, tokens).squeeze(2) * self.is_caption).sum(dim=1)

    def scores(
        self, log_probabilities: torch.Tensor, cosines: torch.Tensor, options: MomeGenerationConfig
    ) -> torch.Tensor:
        """(candidates,): (1 − λ) log p(y|x) / |y|^α + λ τ cos(x, y)."""
        weight, scale = options.rerank_weight, options.rerank_scale
        scale = self.captioner.model.logit_scale.float().exp() if scale is None else scale
        length_penalty = 1.0 if options.length_penalty is None else options.length_penalty
        fluency = log_probabilities / self.is_caption.sum(dim=1).clamp(min=1) ** length_penalty
        return (1 - weight) * fluency + weight * scale * cosines


# ------------------------------------------------------------------------------------------------- the whole call


def eos_token_ids(config: MomeConfig, options: GenerationConfig) -> list[int]:
    """The ids that end a caption: those of the options, or else the model's; none where neither names one."""
    eos = config.eos_token_id if options.eos_token_id is None else options.eos_token_id
    if isinstance(eos, torch.Tensor):
        eos = eos.flatten().tolist()
    return [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]


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
        self.image_outputs = self.kwargs.get("image_outputs")
        if self.image_outputs is None:
            wanted = {name: getattr(self.options, name) for name in ("output_attentions", "output_hidden_states")}
            wanted = {name: value for name, value in wanted.items() if value}
            self.image_outputs = self.captioner.image_pass_for_captions(pixel_values, **wanted)
        self.image_embeds = self.captioner.model.project_image(self.image_outputs.last_hidden_state).float()
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
                    eos_token_ids(self.captioner.config, self.options),
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
        eos = eos_token_ids(self.captioner.config, options)
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


__all__ = [
    "CONTRASTIVE_TOP_K",
    "GUIDANCE_PRESETS",
    "CaptionCandidates",
    "CaptionGuidance",
    "CaptionPrompt",
    "ClassifierFreeGuidance",
    "ContrastiveGuidance",
    "MomeGenerationConfig",
    "embed_captions",
    "eos_token_ids",
    "guidance_options",
]
