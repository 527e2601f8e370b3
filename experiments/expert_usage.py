"""How much each routed expert is used, and for what: its share of the tokens, and a picture of patches and words.

    python -m mome.experiments.expert_usage --checkpoint DIR --data held-out-*.parquet --picture usage.png

    images ─ image pass ─ router logits (images, tokens, experts) of each layer ─┐
                                                                                 ├─ GroupRouting ─ shares, picture
    texts ── text pass ── router logits (texts, tokens, experts) of each layer ──┘

An expert's share is its part of all choices in its group: each token makes `experts_per_token` of them. The picture
shows the tokens that have an expert as their first choice: random patches, and the words that go to it most often. Of
each image, the first text is used.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from ..data.images import read_image
from ..data.sheet import Line, Row, contact_sheet
from ..embedder import Embedder
from ..evaluation.results import append_figures
from .arguments import add_pair_arguments, add_results_argument, described, pairs_from

PATCHES, PATCH_SIDE, LABEL_WIDTH = 14, 32, 130  # of a row of the picture; the last two in pixels
WORDS, RARE = 8, 5  # words of a row; rarer ones say little about the expert that takes them


@dataclass(frozen=True)
class GroupRouting:
    """Which experts the tokens of one group took.

    Attributes:
        group: `"image"` or `"text"`.
        experts: (layers, tokens, experts_per_token) int64, most likely first.
        num_experts: of the group.
    """

    group: str
    experts: torch.Tensor
    num_experts: int

    def shares(self) -> torch.Tensor:
        """(layers, experts); each row adds up to 1."""
        counts = [torch.bincount(layer.flatten(), minlength=self.num_experts) for layer in self.experts]
        return torch.stack(counts) / self.experts[0].numel()

    def tokens_of(self, layer: int, expert: int) -> torch.Tensor:
        """Indices of the tokens that have this expert as their first choice."""
        return (self.experts[layer, :, 0] == expert).nonzero().flatten()


def choices(router_logits: Sequence[torch.Tensor], experts_per_token: int, mask: torch.Tensor) -> torch.Tensor:
    """Per layer (batch, tokens, experts) logits and a (batch, tokens) bool mask → (layers, tokens, choices)."""
    chosen = [logits[mask].topk(experts_per_token, dim=-1).indices for logits in router_logits]
    return torch.stack(chosen).cpu()


def route_images(embedder: Embedder, images: Sequence) -> GroupRouting:
    """All tokens, image by image: `[CLS]`, then the patches row by row."""
    model, parts = embedder.model, []
    for pixel_values in embedder.pixel_batches(images):
        with embedder.evaluating():
            logits = model.get_image_features(pixel_values, output_router_logits=True).router_logits
        every_token = torch.ones(logits[0].shape[:2], dtype=torch.bool)
        parts.append(choices(logits, model.config.experts_per_token, every_token))
    return GroupRouting("image", torch.cat(parts, dim=1), model.config.experts_per_group)


def route_texts(embedder: Embedder, texts: Sequence[str]) -> tuple[GroupRouting, list[str]]:
    """All tokens, text by text, without padding; and the tokens as strings."""
    model, parts, tokens = embedder.model, [], []
    for inputs in embedder.token_batches(texts):
        mask = inputs["attention_mask"].bool()
        with embedder.evaluating():
            logits = model.get_text_features(**inputs, output_router_logits=True).router_logits
        parts.append(choices(logits, model.config.experts_per_token, mask))
        tokens += embedder.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][mask].tolist())
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
    """Words with at least `RARE` occurrences, those first of which the largest part is in `taken` (indices)."""
    everywhere, here = Counter(tokens), Counter(tokens[index] for index in taken.tolist())
    parts = {word: number / everywhere[word] for word, number in here.items() if everywhere[word] >= RARE}
    return sorted(parts, key=lambda word: (-parts[word], -here[word], word))[:count]


def draw(
    image: GroupRouting, patches: np.ndarray, text: GroupRouting, tokens: Sequence[str], layers: Sequence[int]
) -> Image.Image:
    """Of each of `layers` a row for each expert: image experts with some of their patches, text experts with words."""
    rng, blocks = np.random.default_rng(0), []
    for layer in layers:
        blocks.append(Line(f"layer {layer + 1}", size=16))
        for expert in range(image.num_experts):
            taken = rng.permutation(image.tokens_of(layer, expert).numpy())[:PATCHES]
            label = [_label(image, layer, expert)]
            blocks.append(Row(label, list(patches[taken]), None, PATCH_SIDE, LABEL_WIDTH, frame=True))
        for expert in range(text.num_experts):
            words = (
                "  ".join(typical_words(tokens, text.tokens_of(layer, expert))) or "no word has it as its first choice"
            )
            blocks.append(Row([_label(text, layer, expert)], (), Line(words), label_width=LABEL_WIDTH))
    return contact_sheet(blocks)


def _label(routing: GroupRouting, layer: int, expert: int) -> Line:
    share = routing.shares()[layer, expert].item()
    return Line(f"{routing.group} {expert + 1}: {share:.0%}", bar=share)


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
    parser.add_argument("--picture", type=Path, help="PNG to draw the experts' patches and words to")
    parser.add_argument("--layers", type=int, nargs="+", help="of the picture, from 1 (default: all)")
    add_results_argument(parser)
    options = parser.parse_args(argv)
    model = AutoModel.from_pretrained(options.checkpoint).eval()
    if model.config.experts_per_group == 1:
        parser.error(f"{options.checkpoint} has one expert a modality, so nothing is routed: pass a routed model")
    layers = options.layers or range(1, model.config.num_hidden_layers + 1)
    if wrong := [layer for layer in layers if not 1 <= layer <= model.config.num_hidden_layers]:
        parser.error(f"--layers {wrong[0]}: the model has layers 1 to {model.config.num_hidden_layers}")
    embedder = Embedder(model, AutoProcessor.from_pretrained(options.checkpoint), options.checkpoint)
    pairs = pairs_from(options)
    images = [read_image(pair.image, f"image {number}") for number, pair in enumerate(pairs)]
    image = route_images(embedder, images)
    text, tokens = route_texts(embedder, [pair.texts[0] for pair in pairs])
    print(table([image, text]))
    if options.picture:
        patches = patches_of(images, model.config.patch_size, model.config.grid_size)
        draw(image, patches, text, tokens, [layer - 1 for layer in layers]).save(options.picture)
    if options.results:
        figures = {}
        for each in (image, text):
            name, shares = f"{each.group}: {{}} share of an expert", each.shares()
            figures |= {name.format("smallest"): shares.min().item(), name.format("largest"): shares.max().item()}
        data = described(options, pairs)
        append_figures(options.results, "mome.experiments.expert_usage", data, figures, "routing, ", argv)
    return image, text


if __name__ == "__main__":
    main()
