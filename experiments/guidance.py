"""Does guidance help? Captions of held-out images with and without it, and how good they are.

    python -m mome.experiments.guidance --checkpoint DIR --data held-out-*.parquet --results evaluation/results.csv

For each setting (greedy, beam 4, re-ranked, classifier-free, contrastive) it reports

- `cosine`: mean cosine of image and caption, and `R@1`: share of captions that rank their own image first;
- `exact match`, `token F1`, and with the extra `eval` also `BLEU-4` and `CIDEr`, against the references.

The first two tell how specific a caption is to its image, the others how close it is to what people wrote; guidance
trades one for the other. Cosine and R@1 use the captioner's own embeddings, which re-ranking and contrastive guidance
use as well: `--judge DIR` measures with another checkpoint instead.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from ..embedder import Embedder
from ..evaluation.metrics import bleu4_and_cider, exact_match, retrieval_recall, token_f1
from ..evaluation.results import append_rows, command_of, environment
from ..guidance_mome import GUIDANCE_PRESETS
from .arguments import add_pair_arguments, add_results_argument, described, pairs_from

BASELINE = "unguided"


def settings(
    rerank_weights: Sequence[float],
    guidance_scales: Sequence[float],
    contrastive_weights: Sequence[float],
    beams: int = 4,
    candidates: int = 4,
) -> dict[str, dict[str, Any]]:
    """The settings to compare: name → options of `generate()`, independent of the checkpoint's defaults."""
    plain = {**GUIDANCE_PRESETS["none"], "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    chosen = {BASELINE: plain, f"beam {beams}": plain | {"num_beams": beams}}
    for weight in rerank_weights:
        options = {"num_beams": candidates, "rerank_candidates": candidates, "rerank_weight": weight}
        chosen[f"re-ranked λ={weight:g} of {candidates}"] = plain | options
    for scale in guidance_scales:
        chosen[f"classifier-free γ={scale:g}"] = plain | {"guidance_scale": scale}
    for weight in contrastive_weights:
        chosen[f"contrastive β={weight:g}"] = plain | {"contrastive_weight": weight}
    return chosen


def measure(
    captions: list[str], references: list[list[str]], image_embeds: torch.Tensor, text_embeds: torch.Tensor
) -> dict[str, float]:
    """All metrics of one setting; captions, references and embeddings in the order of the images."""
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
    """Rows of the results file, each compared with the unguided captions of the same run."""
    rows = []
    for name, values in scores.items():
        for metric, value in values.items():
            base = scores[BASELINE][metric]
            ratio = f"{value / base:.3f}" if base else ""
            row = {"data": data, "metric": f"captions, {metric}: {name}", "value": f"{value:.4g}", "peer": BASELINE}
            rows.append({**row, "peer_value": f"{base:.4g}", "ratio": ratio})
    return rows


def load(checkpoint: str, trust_remote_code: bool, captions: bool = False) -> Embedder:
    """A checkpoint, with the package's code or its own."""
    trust = {"trust_remote_code": trust_remote_code}
    auto_class = AutoModelForImageTextToText if captions else AutoModel
    model = auto_class.from_pretrained(checkpoint, **trust).eval()
    return Embedder(model, AutoProcessor.from_pretrained(checkpoint, **trust), checkpoint)


def options_from(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub repository")
    add_pair_arguments(parser)
    parser.add_argument("--rerank-weight", type=float, nargs="*", default=[0.5], metavar="λ")
    parser.add_argument("--rerank-candidates", type=int, default=4, help="beams that are re-ranked (default: 4)")
    parser.add_argument("--guidance-scale", type=float, nargs="*", default=[1.5, 2.0], metavar="γ")
    parser.add_argument("--contrastive-weight", type=float, nargs="*", default=[1.0, 2.0], metavar="β")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--judge", help="checkpoint that cosine and R@1 come from (default: the captioner)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the checkpoint's code, not the package's"
    )
    add_results_argument(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    argv = sys.argv[1:] if argv is None else argv
    options = options_from(argv)
    pairs = pairs_from(options)
    images, references = [pair.image for pair in pairs], [pair.texts for pair in pairs]
    captioner = load(options.checkpoint, options.trust_remote_code, captions=True)
    judge = load(options.judge, options.trust_remote_code) if options.judge else captioner
    image_embeds = judge.embed_images(images, options.batch_size, progress=True)
    weights = options.rerank_weight, options.guidance_scale, options.contrastive_weight
    scores = {}
    for name, generate in settings(*weights, candidates=options.rerank_candidates).items():
        print(f"{name}:", file=sys.stderr)
        captions = captioner.caption_images(images, options.batch_size, True, options.max_new_tokens, **generate)
        text_embeds = judge.embed_texts(captions, options.batch_size, allow_blank=True)
        scores[name] = measure(captions, references, image_embeds, text_embeds)
    print(table(scores))
    if options.results:
        judged = f", judged by {options.judge}" if options.judge else ""
        common = environment() | {"command": command_of("mome.experiments.guidance", argv)}
        rows = rows_of(scores, f"{described(options, pairs)}{judged}")
        append_rows(options.results, [common | row for row in rows])
    return scores


if __name__ == "__main__":
    main()
