"""One step of `mome.training.device` by however many processes run this file; the first one saves what it gives.

torchrun --nproc_per_node 2 tests/device_worker.py RECIPE.yaml OUTPUT
"""

import sys
from unittest import mock

import torch
from accelerate import PartialState

from mome.icons.drawing import Drawing, Drawn, draw_plain
from mome.icons.phrases import bare_texts
from mome.training.device import phases, trainer
from mome.training.device.recipe import DeviceRecipe


def plain(icons, rows, options: Drawing, dtype) -> Drawn:
    """Pictures without randomness, which every process draws of its own."""
    none = torch.full_like(rows, -1)
    return Drawn(draw_plain(icons, rows, dtype), none, none, none)


def names(icons, phrases, rows, *others):
    return bare_texts(icons, phrases, icons.name[rows].long(), others[-1])


def step_of(recipe: DeviceRecipe) -> dict[str, dict]:
    """Losses, means over the processes, and gradients of the first step, by name."""
    run = trainer.DeviceTrainer(recipe)
    now = phases.Moment("first", 0.5, 0.5, 16, True)
    gradients = {}
    recipe.max_grad_norm = 1e9
    with mock.patch.multiple(trainer, draw=plain, descriptions=names, captions=names):
        with mock.patch.object(run.optimizer, "step", lambda: gradients.update(_gradients(run))):
            losses = run.step(now, 0.5)
    means = run.accelerator.reduce(torch.stack([loss.detach() for loss in losses]), "mean")
    return {"losses": dict(zip(losses._fields, means.tolist())), "gradients": gradients}


def _gradients(run) -> dict[str, torch.Tensor]:
    found = run.captioner.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in found if parameter.grad is not None}


if __name__ == "__main__":
    made = step_of(DeviceRecipe.from_yaml(sys.argv[1]))
    if PartialState().is_main_process:
        torch.save(made, sys.argv[2])
    PartialState().destroy_process_group()
