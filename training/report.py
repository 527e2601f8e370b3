"""What a run writes down: its log, contact sheets, rows of results, and the model card at the end."""

import json
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ..evaluation.results import append_rows, environment
from ..processing_mome import load_rgb_image
from .objective import GROUPS
from .recipe import Recipe


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


def contact_sheet(
    images: list, captions: list[str], references: list[str], columns: int = 8, side: int = 128
) -> Image.Image:
    """Images with what the model says of them, and below it, in grey, what the data says."""
    font, lines, line_height = ImageFont.load_default(size=11), 4, 13
    cell = side + lines * line_height + 8
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, caption, reference) in enumerate(zip(images, captions, references)):
        left, top = (index % columns) * (side + 8) + 4, (index // columns) * cell + 4
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else load_rgb_image(image)
        image.thumbnail((side, side)) if max(image.size) > side else None
        sheet.paste(image.resize((side, side)) if max(image.size) < side else image, (left, top))
        y = top + side + 2
        for text, colour in ((caption or "(nothing)", "black"), (reference, "#888888")):
            for line in textwrap.wrap(text, 22)[: lines // 2]:
                pen.text((left, y), line, fill=colour, font=font)
                y += line_height
    return sheet


def write_results(path: Path, evaluation: str, data: str, figures: dict[str, float], stage: str):
    """Appends every figure as a row of the results file."""
    command = shlex.join(["python", "-m", "mome.training", *sys.argv[1:]])
    common = environment() | {"command": command, "data": data}
    append_rows(
        path,
        [
            common | {"metric": f"{evaluation}, {stage}: {name}", "value": f"{value:.4g}"}
            for name, value in figures.items()
        ],
    )


def write_card(
    folder: Path, recipe: Recipe, model: nn.Module, figures: dict[str, dict[str, float]], history: dict[str, Any]
):
    """`README.md` of the trained model: what it is, from which data, how good, what it can't do."""
    card = dict(recipe.card)
    limitations = card.pop(
        "limitations", "Not assessed beyond the figures above. It knows what its training data shows."
    )
    description = card.pop("description", "")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=recipe.checkpoint,
        tags=["mome", "image-captioning", "zero-shot-image-classification"],
        model_name=folder.name,
        eval_results=[
            EvalResult(
                task_type="image-to-text",
                dataset_type=recipe.evaluations[name]["dataset"],
                dataset_name=name,
                metric_type=metric,
                metric_value=round(value, 4),
            )
            for name, values in figures.items()
            for metric, value in values.items()
        ]
        or None,
        **card,
    )
    table = "\n".join(
        f"| {name} | {metric} | {value:.4g} |" for name, values in figures.items() for metric, value in values.items()
    )
    losses = f"contrastive × {recipe.contrastive_weight:g} + caption × {recipe.caption_weight:g}"
    body = f"""---
{data.to_yaml()}
---

# {folder.name}

{description or "A MoME model: one transformer that embeds images and texts in one space and captions images."}

## Use

```python
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{folder.name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{folder.name}", trust_remote_code=True)
captioner = AutoModelForImageTextToText.from_pretrained("{folder.name}", trust_remote_code=True)
```

## Data

Trained on `{recipe.dataset}` (split `{recipe.split}`), {history["pairs"]:,} pairs seen, \
{history["bad"]:,} rows left out.

## Training

{"From `" + str(recipe.checkpoint) + "`." if recipe.checkpoint else "From scratch."} {history["steps"]:,} steps of \
{recipe.batch_size} pairs, losses {losses}, AdamW, learning rate {recipe.learning_rate:g}, \
{sum(p.numel() for p in model.parameters()):,} parameters.

## Figures

{"| data | metric | value |" + chr(10) + "|---|---|---|" + chr(10) + table if table else "None were measured."}

## Limitations

{limitations}
"""
    ModelCard(body).save(folder / "README.md")
