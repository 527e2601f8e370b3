"""What a run tells: its log, its trackers, contact sheets, and the model card at the end."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..cards import CAPTIONS, EMBEDDINGS, NOT_ASSESSED, SUMMARY, Card, Figure, facts_of, text_of
from ..configuration_mome import MomeConfig
from ..data.sheet import GREY, Cell, Grid, Line, contact_sheet
from ..evaluation.results import append_rows, environment
from ..modeling_mome import MomeForConditionalGeneration
from .objective import GROUPS, PairModel
from .recipe import Recipe


class Log:
    """`log.jsonl` of a run: one record for every step that is logged and every evaluation.

    When a run goes on from a checkpoint, records of later steps are dropped: they are about to be made again.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        records = [line for line in path.read_text().splitlines() if line] if path.exists() and first_step else []
        kept = [line for line in records if json.loads(line)["step"] <= first_step]
        path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, step: int, **figures: Any):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")


def flops_per_pair(captioner: nn.Module, tokens: int, captions: bool, image_dropout: float, pairs: int = 2) -> float:
    """FLOPs of one pair's training step, forward and backward, counted while one is made.

    Routed experts count as dense ones of the same number of active parameters: the counter can't see into them.

    Args:
        captioner: what is trained; its gradients are gone afterwards, and no random numbers are used up.
        tokens: length of the texts.
    """
    config, device = captioner.config, captioner.device
    with torch.random.fork_rng():
        if config.experts_per_group > 1:
            captioner = MomeForConditionalGeneration(_dense(config)).to(device)
        model = PairModel(captioner.train(), 0.0, image_dropout, captions)
        pixels = torch.zeros(pairs, config.num_channels, config.image_size, config.image_size, device=device)
        ids = torch.zeros(pairs, tokens, dtype=torch.long, device=device)
        # Attention as plain products: the counter knows no fused kernel of the CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            every_row = torch.ones_like(ids[:, 0], dtype=torch.bool)
            outputs = model(pixels, ids, torch.ones_like(ids), every_row, every_row)
            (outputs.image_embeds.sum() + outputs.text_embeds.sum() + outputs.caption_loss).backward()
    captioner.zero_grad()
    captioner.eval()
    return counter.get_total_flops() / pairs


def _dense(config: MomeConfig) -> MomeConfig:
    """The config of a dense model with the active parameters of a routed one."""
    inner = config.expert_intermediate_size or config.intermediate_size
    dense = {"experts_per_group": 1, "experts_per_token": 1, "expert_intermediate_size": None, "shared_expert": False}
    dense["intermediate_size"] = inner * (config.experts_per_token + config.shared_expert)
    own = {name: getattr(config, name) for name in MomeConfig.__annotations__}
    return MomeConfig(**own | dense)


def gemm_rate(rows: int, width: int, inner: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the trunk's widest matrix product, the best of some calls: what this device gives right now."""
    inputs, weight = (
        torch.ones(rows, width, device=device, dtype=dtype),
        torch.ones(inner, width, device=device, dtype=dtype),
    )
    best, end = float("inf"), time.perf_counter() + 0.3
    with torch.no_grad():
        while time.perf_counter() < end:
            start = time.perf_counter()
            F.linear(inputs, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2 * rows * width * inner / best


class Speed:
    """Pairs per second, and the model's FLOP/s as a share of the rate of a matrix product of its own shape.

    Args:
        batch_size: pairs of a step over all processes.
        flops: FLOPs of one pair.
        gemm: FLOP/s of matrix products on all devices.
        step: steps done so far.
    """

    def __init__(self, batch_size: int, flops: float, gemm: float, step: int):
        self.batch_size, self.flops, self.gemm = batch_size, flops, gemm
        self.restart(step)

    def restart(self, step: int):
        """What went before (a checkpoint, an evaluation) does not count."""
        self.step, self.time = step, time.perf_counter()

    def since_last(self, step: int) -> dict[str, float]:
        rate = (step - self.step) * self.batch_size / (time.perf_counter() - self.time)
        self.restart(step)
        return {"pairs_per_s": rate, "share_of_gemm": rate * self.flops / self.gemm}


def routing_figures(assignments: torch.Tensor | None) -> dict[str, float]:
    """Per layer and group, the smallest and largest share of its tokens' assignments that an expert got."""
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
    """Images with what the model says of them, and below it, in grey, what the data says."""
    cells = [
        Cell(image, (Line(caption or "(nothing)", size=11, most=2), Line(reference, GREY, size=11, most=2)))
        for image, caption, reference in zip(images, captions, references)
    ]
    return contact_sheet([Grid(cells, columns=8, side=128)])


def write_results(path: Path, evaluation: str, data: str, figures: dict[str, float], stage: str):
    """Appends every figure as a row of the results file."""
    command = shlex.join(["python", "-m", "mome.training.finetune", *sys.argv[1:]])
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
    given = dict(recipe.card)
    losses = f"contrastive × {recipe.contrastive_weight:g} + caption × {recipe.caption_weight:g}"
    start = f"From `{recipe.checkpoint}`." if recipe.checkpoint else "From scratch."
    card = Card(
        name=folder.name,
        path=str(folder),
        task=CAPTIONS if recipe.caption_weight else EMBEDDINGS,
        summary=given.pop("description", SUMMARY),
        limitations=given.pop("limitations", NOT_ASSESSED),
        facts=facts_of(model.config, sum(parameter.numel() for parameter in model.parameters())),
        sections={
            "Data": f"Trained on `{recipe.dataset}` (split `{recipe.split}`), {history['pairs']:,} pairs seen, "
            f"{history['bad']:,} rows left out.",
            "Training": f"{start} {history['steps']:,} steps of {recipe.batch_size} pairs, losses {losses}, AdamW, "
            f"learning rate {recipe.learning_rate:g}.",
        },
        figures=[Figure(name, *figure) for name, values in figures.items() for figure in values.items()],
        # A folder of this machine says nothing to the Hub, which takes `base_model` for a repository.
        metadata={"base_model": None if Path(recipe.checkpoint or ".").exists() else recipe.checkpoint, **given},
    )
    (folder / "README.md").write_text(text_of(card), encoding="utf-8")
