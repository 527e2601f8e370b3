"""Gradients of one batch, computed by however many processes run this file; the first one saves them.

torchrun --nproc_per_node 2 tests/distributed_worker.py FOLDER
"""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator

from models import random_batch, tiny_captioner
from mome.training import contrastive, objective
from mome.training.batches import Batch
from mome.training.recipe import Recipe

PAIRS = 32


def whole_batch(config) -> Batch:
    """32 pairs with equal captions, equal groups, padding, a teacher, and two rows that can't be used."""
    given = random_batch(config, size=PAIRS)
    given["input_ids"][5] = given["input_ids"][20]
    given["attention_mask"][5] = given["attention_mask"][20]
    valid = torch.ones(PAIRS, dtype=torch.bool)
    valid[[3, 17]] = False
    captioned = valid.clone()
    captioned[[0, 4, 18]] = False
    positive_ids = torch.stack([torch.arange(PAIRS), torch.arange(PAIRS) % 11 + 100], dim=1)
    positive_ids[5, 0] = 20
    generator = torch.Generator().manual_seed(3)
    teacher_embeds = torch.randn(PAIRS, config.projection_dim, dtype=torch.double, generator=generator)
    teacher_embeds = torch.nn.functional.normalize(teacher_embeds, dim=1) * valid[:, None]
    teacher_embeds[[1, 2, 9]] = 0  # texts that the teacher doesn't know
    return Batch(
        given["pixel_values"].double(),
        given["input_ids"],
        given["attention_mask"],
        positive_ids,
        valid,
        captioned,
        teacher_embeds=teacher_embeds,
    )


def gradients(variant: str, chunk_size: int | None = None, dropout: float = 0.0, **recipe) -> dict[str, torch.Tensor]:
    """Parameter name → gradient, averaged over the processes; `loss` → the loss."""
    accelerator = Accelerator(cpu=True)
    captioner = tiny_captioner(variant, hidden_dropout=dropout).double()
    options = {"output": "-", "dataset": "-", "checkpoint": "-", "steps": 1, "image_dropout": 0.25} | recipe
    settings = Recipe(chunk_size=chunk_size, **options).with_weights_of(captioner.config)
    for name, parameter in captioner.named_parameters():
        parameter.requires_grad_(".joint." not in name)
    model = objective.PairModel(captioner.train(), 0.1, settings.image_dropout, bool(settings.caption_weight))
    model = accelerator.prepare(model)
    batch = whole_batch(captioner.config)
    size = PAIRS // accelerator.num_processes
    own = batch.chunks(size)[accelerator.process_index]
    torch.manual_seed(7)
    losses, totals = objective.backward(accelerator, model, own, settings)
    assert (totals.pairs, totals.bad, totals.taught) == (PAIRS - 2, 2, PAIRS - 5)
    found = {name: each.grad for name, each in captioner.named_parameters() if each.grad is not None}
    return found | {"loss": losses.loss}


def all_at_once(accelerator, model, batch, chunks, terms, recipe) -> objective.StepLosses:
    """What GradCache must equal: all chunks, each with the random numbers it has there, in one graph in memory."""
    outputs = []
    with accelerator.no_sync(model):
        for chunk in chunks:
            state = objective.RandomState(batch.valid)
            with torch.no_grad():  # moves the generator as the first of GradCache's two runs does
                objective._run(model, chunk, embed_only=not terms.needs_caption_routing)
            with state.replayed():
                outputs.append(objective._run(model, chunk))
        sums = [None if each[0] is None else sum(each) for each in list(zip(*outputs))[3:]]
        embeds = [torch.cat(each) for each in list(zip(*outputs))[:2]]
        joined = objective.PairOutputs(*embeds, outputs[0].logit_scale, *sums)
        losses = terms.of(joined, batch, objective._sum_over_ranks(joined.assignments))
        contrastive = objective._contrastive(joined, batch)
        loss = losses.loss + recipe.contrastive_weight * contrastive
        loss.backward()
    if accelerator.num_processes > 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return objective._mean_over_ranks(replace(losses, loss=loss, contrastive=contrastive))


def dropout_pair(variant: str) -> tuple[dict, dict]:
    """Gradients with dropout: of GradCache, and of all chunks at once."""
    found = gradients(variant, 4, dropout=0.2)
    with mock.patch.object(objective, "_backward_in_chunks", all_at_once):
        return found, gradients(variant, 4, dropout=0.2)


@contextlib.contextmanager
def gather_without_gradient():
    """What `accelerate.gather` and open_clip's default do."""
    with mock.patch.object(contrastive._AllGather, "apply", contrastive._gather):
        yield


def main(folder: Path):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    cases = {
        f"{variant}-{chunk}": gradients(variant, chunk, image_dropout=0.0)
        for variant in ("dense", "routed", "siglip")
        for chunk in (None, 4)
    }
    for variant in ("dense", "routed"):
        cases[f"{variant}-dropout"], cases[f"{variant}-dropout-at-once"] = dropout_pair(variant)
    with gather_without_gradient():
        cases["dense-no-gradient-through-the-gather"] = gradients("dense", image_dropout=0.0)
    if accelerator.is_main_process:
        torch.save(cases, folder / "gradients.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
