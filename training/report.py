"""What a run writes down: its log, contact sheets, and the model card at the end."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..cards import CAPTIONS, EMBEDDINGS, NOT_ASSESSED, SUMMARY, Card, Figure, facts_of, text_of
from ..data.sheet import GREY, Cell, Grid, Line, contact_sheet
from .fields import RecipeFields
from .recipe import Recipe

GROUPS = ("image", "text", "caption")  # the groups of experts that the losses reach, as far as a model has them


class Log:
    """`log.jsonl` of a run: one record for every step that is logged and every evaluation.

    When a run is resumed, records of steps after its checkpoint are dropped: those steps are repeated.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        records = [line for line in path.read_text().splitlines() if line] if path.exists() and first_step else []
        kept = [line for line in records if json.loads(line)["step"] <= first_step]
        path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, step: int, **figures: Any):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")


def routing_figures(assignments: torch.Tensor | None) -> dict[str, float]:
    """The smallest and the largest share of a group's assignments that an expert got, per layer and group."""
    if assignments is None:
        return {}
    shares = (assignments / assignments.sum(dim=-1, keepdim=True).clamp(min=1)).cpu()
    figures = {}
    for layer, groups in enumerate(shares):
        for group, experts in zip(GROUPS, groups):
            figures[f"routing/{group}/layer_{layer}/least"] = experts.min().item()
            figures[f"routing/{group}/layer_{layer}/most"] = experts.max().item()
    return figures


def caption_sheet(images: list, captions: list[str], references: list[str]) -> Image.Image:
    """Images with the model's captions and, in grey, those of the data."""
    cells = [
        Cell(image, (Line(caption or "(nothing)", size=11, most=2), Line(reference, GREY, size=11, most=2)))
        for image, caption, reference in zip(images, captions, references)
    ]
    return contact_sheet([Grid(cells, columns=8, side=128)])


def write_card(
    folder: Path, recipe: Recipe, model: nn.Module, figures: dict[str, dict[str, float]], history: dict[str, Any]
):
    """Writes `README.md`, the model card of a trained model.

    Args:
        folder: of the model.
        recipe: what was trained; its `card` gives licence, language, limitations and the like.
        model: the trained captioner.
        figures: evaluation → metric → figure.
        history: how many `steps`, `pairs` and `bad` rows the run has seen.
    """
    recipe = recipe.with_weights_of(model.config)
    losses = f"contrastive × {recipe.contrastive_weight:g} + caption × {recipe.caption_weight:g}"
    start = f"From `{recipe.checkpoint}`." if recipe.checkpoint else "From scratch."
    sections = {
        "Data": f"Trained on `{recipe.dataset}` (split `{recipe.split}`), {history['pairs']:,} pairs seen, "
        f"{history['bad']:,} rows left out.",
        "Training": f"{start} {history['steps']:,} steps of {recipe.batch_size} pairs, losses {losses}, AdamW, "
        f"learning rate {recipe.learning_rate:g}.",
    }
    shown = [Figure(name, *figure) for name, values in figures.items() for figure in values.items()]
    # A folder of this machine says nothing to the Hub, which takes `base_model` for a repository.
    base = None if os.path.exists(recipe.checkpoint or ".") else recipe.checkpoint
    write_card_of(folder, recipe, model, sections, shown, {"base_model": base})


def write_card_of(
    folder: Path,
    recipe: RecipeFields,
    model: nn.Module,
    sections: dict[str, str],
    figures: list[Figure],
    metadata: dict[str, Any] | None = None,
):
    """Writes the card of any run: what its recipe's `card` and the model say, and these sections and figures."""
    given = dict(recipe.card)
    card = Card(
        name=folder.name,
        path=str(folder),
        task=CAPTIONS if recipe.caption_weight else EMBEDDINGS,
        summary=given.pop("description", SUMMARY),
        limitations=given.pop("limitations", NOT_ASSESSED),
        facts=facts_of(model.config, sum(parameter.numel() for parameter in model.parameters())),
        sections=sections,
        figures=figures,
        metadata={**(metadata or {}), **given},
    )
    (folder / "README.md").write_text(text_of(card), encoding="utf-8")
