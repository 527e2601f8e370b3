"""Does guidance do what it is for? Captions of held-out images, unguided and guided, and what they are worth.

    python -m mome.evaluation.guidance --checkpoint DIR --data held-out-*.parquet --results evaluation/results.csv

For each setting (greedy, beam 4, re-ranked, classifier-free, contrastive) it reports

- `cosine`: mean cosine of image and caption, and `R@1`: share of captions that find their image first among all;
- `exact match`, `token F1`, and with `pip install mome[eval]` `BLEU-4` and `CIDEr`, against the references.

The first two say whether a caption is specific to its image, the others whether it says what people said; guidance
moves along the line between them. Cosine and R@1 come from the captioner's own embeddings, which re-ranking and
contrastive guidance look at too: `--judge DIR` measures with another checkpoint instead.
"""

import argparse
import io
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from ..guidance_mome import GUIDANCE_PRESETS
from ..processing_mome import load_rgb_image
from .metrics import bleu4_and_cider, exact_match, retrieval_recall, token_f1
from .results import append_rows, environment

BASELINE = "unguided"


@dataclass(frozen=True)
class Pair:
    """An image, as bytes of a file, and what people said of it."""

    image: bytes
    name: str
    references: list[str]

    def open(self) -> Image.Image:
        return load_rgb_image(Image.open(io.BytesIO(self.image)), self.name)


def load_pairs(files: Sequence[Path], image_column: str, text_column: str, limit: int | None = None) -> list[Pair]:
    """Reads pairs from parquet files, in their order.

    Args:
        image_column: bytes, or a struct with `bytes`, as `datasets` writes images.
        text_column: a text, or a list of texts, all of them references.
        limit: take the first so many.

    Raises:
        ValueError: a column is missing, or nothing is left; with the names that there are.
    """
    pairs: list[Pair] = []
    for path in files:
        table = pq.ParquetFile(path)
        for column in (image_column, text_column):
            if column not in table.schema_arrow.names:
                raise ValueError(f"{path} has no column {column!r}: it has {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(batch_size=256, columns=[image_column, text_column]):
            for row in batch.to_pylist():
                image, texts = row[image_column], row[text_column]
                texts = [texts] if isinstance(texts, str) else [text for text in texts or [] if text and text.strip()]
                if texts and image:
                    image = image["bytes"] if isinstance(image, dict) else image
                    pairs.append(Pair(image, f"{path.name}, pair {len(pairs)}", texts))
                if len(pairs) == limit:
                    return pairs
    if not pairs:
        raise ValueError(f"no image with a text in {', '.join(str(path) for path in files)}")
    return pairs


def settings(
    rerank_weights: Sequence[float],
    guidance_scales: Sequence[float],
    contrastive_weights: Sequence[float],
    beams: int = 4,
) -> dict[str, dict[str, Any]]:
    """What is compared: name → options of `generate()`. Nothing is left to the checkpoint's own defaults."""
    plain = {**GUIDANCE_PRESETS["none"], "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    chosen = {BASELINE: plain, f"beam {beams}": plain | {"num_beams": beams}}
    for weight in rerank_weights:
        options = {"num_beams": beams, "rerank_candidates": beams, "rerank_weight": weight}
        chosen[f"re-ranked λ={weight:g}"] = plain | options
    for scale in guidance_scales:
        chosen[f"classifier-free γ={scale:g}"] = plain | {"guidance_scale": scale}
    for weight in contrastive_weights:
        chosen[f"contrastive β={weight:g}"] = plain | {"contrastive_weight": weight}
    return chosen


def batches_of(pairs: list[Pair], size: int, what: str) -> Iterator[list[Pair]]:
    for start in tqdm(range(0, len(pairs), size), desc=what, unit="batch"):
        yield pairs[start : start + size]


@torch.no_grad()
def write_captions(captioner, processor, pairs: list[Pair], options: dict, batch_size: int, what: str) -> list[str]:
    """One caption per image."""
    captions = []
    for batch in batches_of(pairs, batch_size, what):
        inputs = processor(images=[pair.open() for pair in batch], return_tensors="pt")
        captions += processor.post_process_image_text_to_text(captioner.generate(**inputs, **options))
    return captions


@torch.no_grad()
def embed_images(model, processor, pairs: list[Pair], batch_size: int) -> torch.Tensor:
    """(images, projection_dim), L2-normalised."""
    embeds = []
    for batch in batches_of(pairs, batch_size, "images"):
        inputs = processor(images=[pair.open() for pair in batch], return_tensors="pt")
        embeds.append(model.get_image_features(**inputs).pooler_output.float())
    return torch.cat(embeds)


@torch.no_grad()
def embed_texts(model, processor, texts: list[str], batch_size: int) -> torch.Tensor:
    """(texts, projection_dim), L2-normalised."""
    embeds = []
    for start in range(0, len(texts), batch_size):
        inputs = processor(text=texts[start : start + batch_size], return_tensors="pt", truncation=True)
        embeds.append(model.get_text_features(**inputs).pooler_output.float())
    return torch.cat(embeds)


def measure(
    captions: list[str], references: list[list[str]], image_embeds: torch.Tensor, text_embeds: torch.Tensor
) -> dict[str, float]:
    """All metrics of one setting. Captions, references and embeddings are in the order of the images."""
    similarity = text_embeds @ image_embeds.T
    own = torch.eye(len(captions), dtype=torch.bool)
    scores = {"cosine": similarity.diagonal().mean().item(), "R@1": retrieval_recall(similarity, own, ks=(1,))[1]}
    scores |= {"exact match": exact_match(captions, references), "token F1": token_f1(captions, references)}
    try:
        more = bleu4_and_cider(captions, references)
        scores |= {"BLEU-4": more["bleu4"], "CIDEr": more["cider"]}
    except ModuleNotFoundError as error:
        print(f"BLEU-4 and CIDEr are left out: {error}", file=sys.stderr)
    return scores


def table(scores: dict[str, dict[str, float]]) -> str:
    """Markdown, a line for each setting."""
    names = list(next(iter(scores.values())))
    lines = [f"| captions | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[each]:.3f}' for each in names)} |" for name, row in scores.items()]
    return "\n".join(lines)


def rows_of(scores: dict[str, dict[str, float]], data: str) -> list[dict[str, str]]:
    """Rows of the results file, each beside the unguided captions of the same run."""
    rows = []
    for name, values in scores.items():
        for metric, value in values.items():
            base = scores[BASELINE][metric]
            ratio = f"{value / base:.3f}" if base else ""
            row = {"data": data, "metric": f"captions, {metric}: {name}", "value": f"{value:.4g}", "peer": BASELINE}
            rows.append({**row, "peer_value": f"{base:.4g}", "ratio": ratio})
    return rows


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub repository")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="PARQUET")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--text-column", default="texts", help="a text or a list of texts (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=1000, help="take the first so many (default: %(default)s)")
    parser.add_argument("--rerank-weight", type=float, nargs="*", default=[0.5], metavar="λ")
    parser.add_argument("--guidance-scale", type=float, nargs="*", default=[1.5, 2.0], metavar="γ")
    parser.add_argument("--contrastive-weight", type=float, nargs="*", default=[1.0, 2.0], metavar="β")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--judge", help="checkpoint that cosine and R@1 come from (default: the captioner)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the checkpoint's code, not the package's"
    )
    parser.add_argument("--results", type=Path, help="append the rows to this CSV file")
    options = parser.parse_args(argv)
    trust = {"trust_remote_code": options.trust_remote_code}
    pairs = load_pairs(options.data, options.image_column, options.text_column, options.limit)
    captioner = AutoModelForImageTextToText.from_pretrained(options.checkpoint, **trust).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint, **trust)
    judge, judge_processor = captioner, processor
    if options.judge:
        judge = AutoModel.from_pretrained(options.judge, **trust).eval()
        judge_processor = AutoProcessor.from_pretrained(options.judge, **trust)
    image_embeds = embed_images(judge, judge_processor, pairs, options.batch_size)
    references, scores = [pair.references for pair in pairs], {}
    chosen = settings(options.rerank_weight, options.guidance_scale, options.contrastive_weight)
    for name, generate in chosen.items():
        generate = generate | {"max_new_tokens": options.max_new_tokens}
        captions = write_captions(captioner, processor, pairs, generate, options.batch_size, name)
        text_embeds = embed_texts(judge, judge_processor, captions, options.batch_size)
        scores[name] = measure(captions, references, image_embeds, text_embeds)
    print(table(scores))
    if options.results:
        judged = f", judged by {options.judge}" if options.judge else ""
        data = f"{' '.join(path.name for path in options.data)}, {len(pairs)} images{judged}"
        common = environment() | {"command": shlex.join(["python", "-m", "mome.evaluation.guidance", *argv])}
        append_rows(options.results, [common | row for row in rows_of(scores, data)])
    return scores


if __name__ == "__main__":
    main()
