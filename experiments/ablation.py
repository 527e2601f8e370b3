"""What each part of the design contributes: small models with equal parameters, trained on the same images.

python -m mome.experiments.ablation --output runs/ablation [--width 128] [--steps 400] [--only VARIANT ...]

| variant | towers | captions | experts |
| --- | --- | --- | --- |
| dual | two: every weight is of one modality, as in CLIP | no | – |
| dual-captions | two | yes | – |
| mome-contrastive | one attention, feed-forward experts of a modality | no | one a modality |
| mome | one attention | yes | one a modality |
| mome-routed | one attention | yes | 4 a modality, half as wide, 2 a token |
| mome-untaught | one attention | yes | one a modality, without the teacher that all others have |

Two towers need twice the attention parameters; their feed-forwards are narrower to make up for it. Routed models have
the same active parameters and twice the total. Figures are those of the validation half of the held-out concepts; the
test half stays untouched until a model is chosen. All variants but one use the recipe's teacher: without it the
contrastive loss stays at ln(batch) for hundreds of steps, and short runs of all variants would look the same. An
interrupted run is resumed; a finished one isn't repeated.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from ..evaluation.results import append_figures
from ..modeling_mome import MomeForConditionalGeneration
from ..training.recipe import Recipe
from ..training.trainer import Trainer
from .arguments import add_results_argument

WIDTH, LAYERS = 128, 4
CONTRASTIVE_ONLY = {"caption_weight": 0.0, "image_dropout": 0.0}
VARIANTS = ("dual", "dual-captions", "mome-contrastive", "mome", "mome-routed", "mome-untaught")


def changes_of(variant: str, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of model and recipe in which a variant differs from `mome`."""
    inner = 4 * width
    model = {}
    if variant.startswith("dual"):
        # Two attentions instead of one cost 4 W² a layer; two feed-forwards of inner width I have 4 W I.
        model = {"share_attention": False, "intermediate_size": inner - width}
    elif variant == "mome-routed":
        model = {"experts_per_group": 4, "experts_per_token": 2, "expert_intermediate_size": inner // 2}
    if variant in ("dual", "mome-contrastive"):
        return model, CONTRASTIVE_ONLY
    return model, {"teacher": None} if variant == "mome-untaught" else {}


METRICS = ("text_to_image_r1", "text_to_image_r10", "image_to_text_r1", "image_to_text_r10", "zero_shot_top1")
RECIPE = Path(__file__).parent.parent / "training" / "recipes" / "icons.yaml"


def recipe_for(
    variant: str,
    seed: int,
    output: Path,
    steps: int,
    model: dict[str, Any] | None = None,
    width: int = WIDTH,
    **overrides: Any,
) -> Recipe:
    """The icons recipe with a small model of the variant.

    Args:
        model, overrides: fields of model and recipe that replace the ablation's own, for every variant.
        width: `hidden_size`.
    """
    fields, training = changes_of(variant, width)
    small = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": LAYERS}
    values = {
        "output": str(output / f"{variant}-{seed}"),
        "model": Recipe.from_yaml(RECIPE).model | small | (model or {}) | fields,
        "steps": steps,
        "seed": seed,
        "final_learning_rate_share": 0.0,
        "ema_decay": 0.98,
        "checkpoint_every": 100,
        "evaluate_every": 0,
        "sheet_images": 0,
        "tracker": "none",
        "resume": True,
    }
    return Recipe.from_yaml(RECIPE, values | training | overrides)


def run(recipe: Recipe) -> dict[str, float] | None:
    """Figures of one run, read from its folder if it is finished; `None` if it was stopped."""
    done = Path(recipe.output) / "figures.json"
    if done.exists():
        return json.loads(done.read_text())
    trainer = Trainer(recipe)
    if trainer.train() is None:
        return None
    figures = figures_of(trainer.output)
    if not recipe.caption_weight:  # its captions come from random weights
        figures = {name: value for name, value in figures.items() if not name.startswith("caption")}
    figures |= {"parameters": active_parameters(trainer.plain_captioner), "pairs": trainer.progress.pairs}
    done.write_text(json.dumps(figures))
    return figures


def figures_of(folder: Path) -> dict[str, float]:
    """The last evaluation in a run's log and, with routed experts, the smallest share of tokens that an expert gets.

    Shares are averaged over the last tenth of the log; the smallest is that over all groups and layers.
    """
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [record for record in records if "evaluation" in record][-1]
    figures = {name: value for name, value in last.items() if name not in ("step", "evaluation", "stage")}
    routed = [record for record in records if any(name.endswith("/least") for name in record)]
    routed = routed[-max(1, len(routed) // 10) :]
    if routed:
        names = [name for name in routed[0] if name.endswith("/least")]
        figures["least_expert_share"] = min(statistics.mean(record[name] for record in routed) for name in names)
    return figures


def active_parameters(captioner: MomeForConditionalGeneration) -> int:
    """Parameters without the joint experts, which these losses never train."""
    return sum(each.numel() for name, each in captioner.named_parameters() if ".joint." not in name)


def table(figures: dict[str, list[dict[str, float]]]) -> str:
    """Markdown, a row for each variant: per cent, mean over the seeds ± half the range."""
    head = "variant | parameters | R@1 t→i | R@10 t→i | R@1 i→t | R@10 i→t | zero-shot | caption F1"
    lines = [f"| {head} |", "|---" * 8 + "|"]

    def cell(runs: list[dict[str, float]], metric: str) -> str:
        values = [100 * each[metric] for each in runs if metric in each]
        if not values:
            return "–"
        spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    for variant, runs in figures.items():
        cells = [cell(runs, metric) for metric in (*METRICS, "caption_f1")]
        lines.append(f"| {variant} | {runs[0]['parameters'] / 1e6:.2f} M | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None, **overrides: Any):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--width", type=int, default=WIDTH, help="hidden size of all models (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the forward passes")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT")
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    figures: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for variant in options.only:
            fields = {"width": options.width, "compile": options.compile} | overrides
            found = run(recipe_for(variant, seed, options.output, options.steps, **fields))
            if found is None:
                return
            figures.setdefault(variant, []).append(found)
            print(table(figures), flush=True)
    if options.results:
        for variant, runs in figures.items():
            for seed, each in enumerate(runs):
                data = f"mome-icons validation, width {options.width}, {each['pairs']:.0f} pairs, seed {seed}"
                module, prefix = "mome.experiments.ablation", f"ablation, {variant}: "
                append_figures(options.results, module, data, each, prefix, arguments)


if __name__ == "__main__":
    main()
