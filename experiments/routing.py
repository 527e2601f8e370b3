"""Who takes what: the share of every routed expert, and a picture of the patches and words that it is given.

    python -m mome.experiments.routing --checkpoint DIR --data held-out-*.parquet --picture routing.png --results FILE

    images ─ image pass ─ router logits (images, tokens, experts) of each layer ─┐
                                                                                 ├─ GroupRouting ─ shares, picture
    texts ── text pass ── router logits (texts, tokens, experts) of each layer ──┘

An expert's share is that of its group's tokens times their `experts_per_token` choices. The picture shows each expert
with random patches and with words for which it is the first choice: words of which it gets the largest part. Texts are
the first one of each image.
"""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoProcessor

from ..data.pairs import add_pair_arguments, batches_of, described, pairs_of
from ..evaluation.results import append_rows, environment

PATCHES, PATCH_SIDE = 14, 32  # of a row of the picture, in pixels
WORDS, RARE = 8, 5  # words of a row; rarer ones say little of who takes them
LABEL_WIDTH, ROW_HEIGHT, HEAD_HEIGHT, GAP = 150, PATCH_SIDE + 6, 26, 24
TEXT_WIDTH = 560


@dataclass(frozen=True)
class GroupRouting:
    """Where the tokens of one group of experts went.

    Attributes:
        group: `"image"` or `"text"`.
        experts: (layers, tokens, experts_per_token) int64, likeliest first.
        num_experts: of the group.
    """

    group: str
    experts: torch.Tensor
    num_experts: int

    def shares(self) -> torch.Tensor:
        """(layers, experts), each layer's sum is 1."""
        counts = [torch.bincount(layer.flatten(), minlength=self.num_experts) for layer in self.experts]
        return torch.stack(counts) / self.experts[0].numel()

    def tokens_of(self, layer: int, expert: int) -> torch.Tensor:
        """Indices of the tokens whose first choice the expert is."""
        return (self.experts[layer, :, 0] == expert).nonzero().flatten()


def choices(router_logits: Sequence[torch.Tensor], experts_per_token: int, mask: torch.Tensor) -> torch.Tensor:
    """Per layer (batch, tokens, experts) logits and a (batch, tokens) bool mask → (layers, tokens, choices)."""
    chosen = [logits[mask].topk(experts_per_token, dim=-1).indices for logits in router_logits]
    return torch.stack(chosen).cpu()


@torch.no_grad()
def route_images(model, processor, images: list[Image.Image], batch_size: int = 64) -> GroupRouting:
    """Every token of every image in turn: `[CLS]`, then the patches row by row."""
    parts = []
    for batch in batches_of(images, batch_size, "images"):
        inputs = processor(images=batch, return_tensors="pt")
        logits = model.get_image_features(**inputs, output_router_logits=True).router_logits
        every_token = torch.ones(logits[0].shape[:2], dtype=torch.bool)
        parts.append(choices(logits, model.config.experts_per_token, every_token))
    return GroupRouting("image", torch.cat(parts, dim=1), model.config.experts_per_group)


@torch.no_grad()
def route_texts(model, processor, texts: list[str], batch_size: int = 64) -> tuple[GroupRouting, list[str]]:
    """Every token of every text in turn, padding aside, and what the tokens are called."""
    parts, tokens = [], []
    for batch in batches_of(texts, batch_size, "texts"):
        inputs = processor(text=batch, return_tensors="pt", truncation=True)
        mask = inputs["attention_mask"].bool()
        logits = model.get_text_features(**inputs, output_router_logits=True).router_logits
        parts.append(choices(logits, model.config.experts_per_token, mask))
        tokens += processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][mask].tolist())
    return GroupRouting("text", torch.cat(parts, dim=1), model.config.experts_per_group), tokens


# --------------------------------------------------------------------------------------------------- picture


def patches_of(images: list[Image.Image], side: int, grid: int) -> np.ndarray:
    """Tokens of the image pass as pictures, uint8, (images × (1 + grid²), side, side, 3); `[CLS]` is grey."""
    count = len(images)
    pixels = np.stack([np.asarray(image.resize((grid * side,) * 2)) for image in images])
    patches = pixels.reshape(count, grid, side, grid, side, 3).swapaxes(2, 3).reshape(count, grid**2, side, side, 3)
    whole = np.full((count, 1, side, side, 3), 160, np.uint8)
    return np.concatenate([whole, patches], axis=1).reshape(-1, side, side, 3)


def typical_words(tokens: Sequence[str], taken: torch.Tensor, count: int = WORDS) -> list[str]:
    """Of the words with at least `RARE` occurrences, those of which the largest part is in `taken` (indices)."""
    everywhere, here = Counter(tokens), Counter(tokens[index] for index in taken.tolist())
    parts = {word: number / everywhere[word] for word, number in here.items() if everywhere[word] >= RARE}
    return sorted(parts, key=lambda word: (-parts[word], -here[word], word))[:count]


def draw(image: GroupRouting, patches: np.ndarray, text: GroupRouting, tokens: Sequence[str]) -> Image.Image:
    """A row for each expert of each layer: image experts with patches on the left, text experts with words."""
    layers, experts = len(image.experts), image.num_experts
    patches_width = PATCHES * (PATCH_SIDE + 2)
    left_of_text = LABEL_WIDTH + patches_width + GAP
    block = HEAD_HEIGHT + experts * ROW_HEIGHT
    sheet = Image.new("RGB", (left_of_text + LABEL_WIDTH + TEXT_WIDTH, layers * block + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    rng = np.random.default_rng(0)
    shares = {each.group: each.shares() for each in (image, text)}
    for layer in range(layers):
        top = layer * block
        pen.text((8, top + 6), f"layer {layer + 1}", fill="black", font=font)
        for expert in range(experts):
            y = top + HEAD_HEIGHT + expert * ROW_HEIGHT
            for group, left in (("image", 8), ("text", left_of_text)):
                share = shares[group][layer, expert].item()
                pen.rectangle((left, y + 18, left + share * (LABEL_WIDTH - 20), y + 26), fill="#6470d8")
                pen.text((left, y), f"{group} {expert + 1}: {share:.0%}", fill="black", font=font)
            taken = image.tokens_of(layer, expert).numpy()
            for place, index in enumerate(rng.permutation(taken)[:PATCHES]):
                x = LABEL_WIDTH + place * (PATCH_SIDE + 2)
                sheet.paste(Image.fromarray(patches[index]).resize((PATCH_SIDE,) * 2), (x, y))
                pen.rectangle((x - 1, y - 1, x + PATCH_SIDE, y + PATCH_SIDE), outline="#cccccc")
            words = "  ".join(typical_words(tokens, text.tokens_of(layer, expert)))
            pen.text((left_of_text + LABEL_WIDTH, y + 8), words or "first choice of no word", fill="black", font=font)
    return sheet


def table(groups: Sequence[GroupRouting]) -> str:
    """Markdown: the share of every expert, a line for each group and layer."""
    lines = [f"| experts | {' | '.join(str(1 + each) for each in range(groups[0].num_experts))} |"]
    lines.append("|---" * (groups[0].num_experts + 1) + "|")
    for each in groups:
        for layer, shares in enumerate(each.shares().tolist()):
            lines.append(f"| {each.group}, layer {layer + 1} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> tuple[GroupRouting, GroupRouting]:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub repository of a routed model")
    add_pair_arguments(parser)
    parser.add_argument("--picture", type=Path, help="where to draw who takes what, as PNG")
    parser.add_argument("--results", type=Path, help="CSV file to append the smallest and largest share to")
    options = parser.parse_args(argv)
    model = AutoModel.from_pretrained(options.checkpoint).eval()
    if model.config.experts_per_group == 1:
        parser.error(
            f"{options.checkpoint} has one expert a modality, there is nothing to choose: pass a routed model"
        )
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    pairs = pairs_of(options)
    images = [pair.open() for pair in pairs]
    image = route_images(model, processor, images)
    text, tokens = route_texts(model, processor, [pair.references[0] for pair in pairs])
    print(table([image, text]))
    if options.picture:
        patches = patches_of(images, model.config.patch_size, model.config.grid_size)
        draw(image, patches, text, tokens).save(options.picture)
    if options.results:
        common = environment() | {
            "command": shlex.join(["python", "-m", "mome.experiments.routing", *argv]),
            "data": described(options, pairs),
        }
        rows = []
        for each in (image, text):
            for metric, value in (("smallest", each.shares().min()), ("largest", each.shares().max())):
                rows.append({"metric": f"routing, {each.group}: {metric} share of an expert", "value": f"{value:.4g}"})
        append_rows(options.results, [common | row for row in rows])
    return image, text


if __name__ == "__main__":
    main()
