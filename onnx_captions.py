"""Captions by the files of an export: the likeliest token each time, as the checkpoint's generation config allows.

pixel_values ─ vision ─ present.* ─┐
                                   ├─ past_key_values.* ─┐
             nothing of the rest ──┘                     │
[BOS], then the token that was chosen last ──────────── decoder ─┬─ logits ─ rules ─ the next token
                                                                 └─ present.* ─ past_key_values.* of the next step
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedConfig,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from .captioning_mome import prepare_prompt
from .configuration_mome import quoted
from .embedder import CAPTION_TOKENS
from .errors import MomeError, first_line
from .guidance_mome import MomeGenerationConfig

PAST, PRESENT = "past_key_values.", "present."  # how inputs and outputs of the cache begin


def greedy_ids(
    vision: Any,
    decoder: Any,
    config: PreTrainedConfig,
    end_tokens: list[int],
    pixel_values: torch.Tensor,
    max_new_tokens: int = CAPTION_TOKENS,
    prompt: Mapping[str, torch.Tensor] | None = None,
    rules: GenerationConfig | None = None,
) -> torch.Tensor:
    """Captions by the sessions of two files, the likeliest token each time; see `OnnxEmbedder.caption_ids`.

    A cache starts as the vision model's `present.*`, and what that does not give as nothing; what a step gives takes
    its place, and the rest of it stays.

    Args:
        vision, decoder: of ONNX Runtime.
        config: of the model.
        end_tokens: any of them ends a caption.
        pixel_values, max_new_tokens, prompt: see `OnnxEmbedder.caption_ids`.
        rules: what may be written, see `caption_rules`.
    """
    grown = [output.name for output in decoder.get_outputs() if output.name.startswith(PRESENT)]
    states = _first_states(vision, decoder, pixel_values)
    batch, cached = len(pixel_values), states[_as_past(grown[0])].shape[2]
    ids, mask = np.full((batch, 1), config.bos_token_id, dtype=np.int64), np.ones((batch, 1), dtype=np.int64)
    if prompt is not None:
        given = prompt["input_ids"], prompt["attention_mask"], None
        ids, mask = (each.numpy() for each in prepare_prompt(config, *given, end_tokens)[:2])
    room = config.max_position_embeddings - int(mask.sum(axis=1).max())
    most = min(max_new_tokens, room)
    judge = _judge_of(rules, config, end_tokens, mask, most)
    mask = np.pad(mask, ((0, 0), (cached, 0)), constant_values=1)
    written, ended = [ids], np.zeros((batch, 1), dtype=bool)
    for _ in range(most):
        logits, *found = decoder.run(["logits", *grown], {"input_ids": ids, "attention_mask": mask, **states})
        states |= zip(map(_as_past, grown), found)
        ids = np.where(ended, config.pad_token_id, judge(written, logits).argmax(axis=-1))
        ended = ended | np.isin(ids, end_tokens)
        written.append(ids)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        if ended.all():
            break
    return torch.from_numpy(np.concatenate(written, axis=1))


def _as_past(name: str) -> str:
    return PAST + name.removeprefix(PRESENT)


def _first_states(vision: Any, decoder: Any, pixel_values: torch.Tensor) -> dict[str, np.ndarray]:
    """What the decoder's first step goes on from: the image's states, and nothing of the rest."""
    names = [output.name for output in vision.get_outputs() if output.name.startswith(PRESENT)]
    found = vision.run(names, {"pixel_values": pixel_values.to("cpu", torch.float32).numpy()}) if names else []
    states = dict(zip(map(_as_past, names), found))
    grown = {_as_past(output.name) for output in decoder.get_outputs()}
    for each in decoder.get_inputs():
        if not each.name.startswith(PAST) or each.name in states:
            continue
        if not names or each.name not in grown:
            raise MomeError(f"the vision model gives no {each.name}: it is of an export without captions")
        _, heads, _, head_dim = each.shape
        kind = np.float16 if each.type == "tensor(float16)" else np.float32
        states[each.name] = np.zeros((len(pixel_values), heads, 0, head_dim), dtype=kind)
    return states


# ------------------------------------------------------------------------------------------------------ the rules

# Settings of `generation_config.json` that change greedy captions and are not kept here, with the value that does not.
NOT_KEPT = {
    "constraints": None,
    "contrastive_weight": 0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "rerank_weight": 0,
    "sequence_bias": None,
    "stop_strings": None,
    "watermarking_config": None,
}


def caption_rules(folder: Path) -> GenerationConfig:
    """What a checkpoint's `generation_config.json` allows greedy captions to say.

    Kept are `suppress_tokens`, `begin_suppress_tokens`, `bad_words_ids`, `min_length`, `min_new_tokens`,
    `no_repeat_ngram_size` and `repetition_penalty`.

    Raises:
        MomeError: a setting that changes greedy captions and can't be kept; a file that is none.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return GenerationConfig()
    try:
        rules = MomeGenerationConfig.from_pretrained(folder)
        _processors_of(rules, 0, 1, torch.tensor([0]), 1)  # they look at their values
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise MomeError(f"{file} is no generation config: {first_line(error)}") from None
    for name, neutral in NOT_KEPT.items():
        value = getattr(rules, name, None)
        if value is not None and value != neutral:
            raise MomeError(
                f"{file} has {name}={quoted(value)}: captions of an export are greedy and can't keep to it; leave it "
                "out there, or load the checkpoint instead"
            )
    return rules


Judge = Callable[[list[np.ndarray], np.ndarray], np.ndarray]


def _judge_of(
    rules: GenerationConfig | None, config: PreTrainedConfig, end_tokens: list[int], mask: np.ndarray, most: int
) -> Judge:
    """Tokens so far and logits (batch, 1, vocabulary) → the logits by the rules, as `generate()` applies them.

    Args:
        mask: (batch, tokens) of the prompt.
        most: tokens that may be written.
    """
    image, start = config.num_image_tokens, config.num_image_tokens + mask.shape[1]
    processors = _processors_of(rules or GenerationConfig(), image, start, torch.tensor(end_tokens).long(), most)
    if not processors:
        return lambda written, logits: logits
    if not mask.all() and any(isinstance(each, RepetitionPenaltyLogitsProcessor) for each in processors):
        raise MomeError(
            f"repetition_penalty={rules.repetition_penalty} counts the padding of prompts of different lengths: pass "
            "those of one length at a time"
        )
    before = np.full((len(mask), image), config.image_token_id or 0)

    def judged(written: list[np.ndarray], logits: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(np.concatenate([before, *written], axis=1))
        return processors(ids, torch.from_numpy(logits[:, 0])).numpy()[:, None]

    return judged


def _processors_of(
    rules: GenerationConfig, image: int, start: int, ends: torch.Tensor, most: int
) -> LogitsProcessorList:
    """In the order of `generate()`; `start`: tokens of image and prompt, of which `image` are the image's."""
    found = LogitsProcessorList()
    if rules.repetition_penalty not in (None, 1):
        found.append(RepetitionPenaltyLogitsProcessor(float(rules.repetition_penalty)))
    if rules.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(rules.no_repeat_ngram_size))
    if rules.bad_words_ids is not None:
        found.append(NoBadWordsLogitsProcessor(rules.bad_words_ids, ends))
    if rules.min_length and rules.min_new_tokens is None and len(ends):  # the latter takes its place
        found.append(MinLengthLogitsProcessor(rules.min_length + image, ends))
    if rules.min_new_tokens and len(ends):
        found.append(MinNewTokensLengthLogitsProcessor(start, min(rules.min_new_tokens, most), ends))
    if rules.suppress_tokens is not None:
        found.append(SuppressTokensLogitsProcessor(rules.suppress_tokens))
    if rules.begin_suppress_tokens is not None:
        found.append(SuppressTokensAtBeginLogitsProcessor(rules.begin_suppress_tokens, start))
    return found


def end_tokens_of(folder: Path, config: PreTrainedConfig) -> list[int]:
    """Ids that end a caption: those of `generation_config.json`, or the config's."""
    file = folder / "generation_config.json"
    given = json.loads(file.read_text()) if file.is_file() else {}
    ids = given.get("eos_token_id", config.eos_token_id)
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


__all__ = ["caption_rules", "end_tokens_of", "greedy_ids"]
