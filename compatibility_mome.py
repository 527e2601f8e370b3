"""What differs between the supported releases of transformers and torch, in one place.

5.24 renamed keys and values of earlier calls from `past_key_values` to `cache`: the argument of forwards, the key that
`generate()` passes on, the field of outputs. This code says `cache`; callers may use either name with any release.

Numbers in `output_hidden_states=[…]` are those of the states, the first layer's input being 0; in older releases those
of the layers, and the input is left out of the answer.

torch before 2.13 takes `torch.compile` for an export.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import output_capturing

OLD_CACHE_NAME = "past_key_values"
_RENAMED = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if _RENAMED else OLD_CACHE_NAME  # the name that the installed transformers uses
NUMBERS_COUNT_THE_INPUT = hasattr(output_capturing, "selected_hidden_states")


def take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Remove the cache from keyword arguments, whichever name it has there, and return it.

    Raises:
        ValueError: both names are given.
    """
    given = {name: kwargs.pop(name) for name in ("cache", OLD_CACHE_NAME) if name in kwargs}
    if len([cache for cache in given.values() if cache is not None]) > 1:
        raise ValueError(f"got both cache and {OLD_CACHE_NAME}, two names for the same: pass cache only")
    return next((cache for cache in given.values() if cache is not None), None)


def accepts_cache(forward: Callable) -> Callable:
    """Lets a function with the argument `cache` be called with the old name as well."""

    @functools.wraps(forward)
    def renamed(*args, **kwargs):
        if OLD_CACHE_NAME in kwargs:
            kwargs["cache"] = take_cache(kwargs)
        return forward(*args, **kwargs)

    return renamed


def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, which in what torch 2.11 compiles is true as well; its flag is not."""
    return torch.compiler.is_exporting() and getattr(torch.compiler, "_is_exporting_flag", True)


@dataclass
class MomeCachedOutput(CausalLMOutputWithPast):
    """`loss`, `logits`, `cache`, `hidden_states`, `attentions`, with the cache's field called as transformers does."""

    loss: torch.Tensor | None = None


if not _RENAMED:  # since 5.24, transformers' outputs answer to both names
    MomeCachedOutput.cache = property(lambda self: self[OLD_CACHE_NAME] if OLD_CACHE_NAME in self else None)


__all__ = [
    "CACHE_NAME",
    "NUMBERS_COUNT_THE_INPUT",
    "MomeCachedOutput",
    "accepts_cache",
    "is_exporting",
    "take_cache",
]
