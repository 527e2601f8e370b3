"""The model card of a run with everything on the device."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ...cards import Figure
from ..report import write_card_of
from .recipe import DeviceRecipe

# Metric of `Evaluator` → its name in `mome.cards`; the others keep theirs.
METRICS = {
    "pictures": "images",
    "name, text to image, R@1": "text_to_image_r1",
    "name, text to image, R@10": "text_to_image_r10",
    "name, image to text, R@1": "image_to_text_r1",
    "name, image to text, R@10": "image_to_text_r10",
    "zero-shot": "zero_shot_top1",
    "caption F1": "caption_f1",
}


def write_card(
    folder: Path,
    recipe: DeviceRecipe,
    model: nn.Module,
    figures: Mapping[str, Mapping[str, float]],
    history: Mapping[str, int],
    splits: list[str],
):
    """Writes `README.md` beside the weights.

    Args:
        folder: of the model.
        recipe: what was trained; its `card` gives licence, language, limitations and the like.
        model: the trained captioner.
        figures: evaluation → metric → figure.
        history: the run's `steps`, of which `text_steps` had no pictures, `pairs` and `seconds`.
        splits: that the weights have seen.
    """
    losses = f"contrastive × 1 + caption × {recipe.caption_weight:g} + teacher × {recipe.teacher_weight:g} (texts)"
    device = next(model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    sections = {
        "Data": f"Trained on `{recipe.data}`, splits {', '.join(splits)}; {history['pairs']:,} pairs seen.",
        "Training": f"From scratch in {history['seconds']:,} seconds on {where}: {history['text_steps']:,} steps "
        f"of {recipe.text_batch_size:,} texts, then {history['steps'] - history['text_steps']:,} of up to "
        f"{recipe.batch_size:,} pairs. Losses {losses} and × {recipe.image_teacher_weight:g} (images), AdamW, "
        f"learning rate {recipe.learning_rate:g}. The weights are a moving average over the steps.",
    }
    shown = [
        Figure(name, METRICS.get(metric, metric), value)
        for name, values in figures.items()
        for metric, value in values.items()
    ]
    write_card_of(folder, recipe, model, sections, shown)
