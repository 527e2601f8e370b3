"""The weighted mean of related checkpoints: part of what fine-tuning has unlearnt comes back.

    python -m mome.training.average CHECKPOINT CHECKPOINT ... [--weights W W ...] --output DIR

A fine-tuned model gains on the new data and loses on the old; on the line between the two sets of weights are models
that keep most of both (WiSE-FT, 2109.01903; model soups, 2203.05482). This works if one was fine-tuned from the other,
or both from a third, but not for models that were trained separately.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ..configuration_mome import quoted
from ..errors import first_line
from ..processing_mome import MomeProcessor


def average(models: Sequence[PreTrainedModel], weights: Sequence[float]) -> PreTrainedModel:
    """The first model, with the weighted mean of all models' parameters and buffers.

    Args:
        models: at least two, of the same configuration; the first one is changed.
        weights: one per model, not negative, with a sum of 1.

    Raises:
        ValueError: weights that are too many, too few, negative or of another sum; models of different shapes.
    """
    if len(models) < 2 or len(models) != len(weights):
        raise ValueError(
            f"{len(models)} models and {len(weights)} weights: give two models or more, and one weight each"
        )
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"weights={quoted(list(weights))} must not be negative, and their sum must be 1, not {sum(weights):g}"
        )
    states = [model.state_dict() for model in models]
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
    for number, each in enumerate(shapes[1:], 2):
        if different := sorted(name for name in shapes[0].keys() | each if shapes[0].get(name) != each.get(name)):
            name = different[0]
            raise ValueError(
                f"model {number} differs from the first: {name} has shape {each.get(name)}, not {shapes[0].get(name)}"
            )
    means = {}  # all are computed before any is written: tied parameters have two names
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            parts = [weight * state[name].double() for weight, state in zip(weights, states)]
            means[name] = torch.stack(parts).sum(dim=0).to(tensor.dtype)
    models[0].load_state_dict(states[0] | means)
    return models[0]


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="folders; the processor is that of the last"
    )
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of each checkpoint (default: equal)")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    count = len(options.checkpoints)
    weights = options.weights or [1 / count] * count
    for folder in options.checkpoints:
        if not os.path.exists(folder / "config.json"):
            parser.error(f"{quoted(folder)} is no checkpoint: it has no config.json")
    try:
        models = [AutoModelForImageTextToText.from_pretrained(folder) for folder in options.checkpoints]
        average(models, weights).save_pretrained(options.output)
    except ValueError as error:
        parser.error(first_line(error))
    MomeProcessor.from_pretrained(options.checkpoints[-1]).save_pretrained(options.output)
    shares = ", ".join(f"{weight:g} × {folder}" for weight, folder in zip(weights, options.checkpoints))
    print(f"{options.output}: {shares}")


if __name__ == "__main__":
    main()
