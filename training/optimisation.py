"""Which parameters learn, how fast, and their moving average."""

import contextlib
import fnmatch
import math
import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..configuration_mome import quoted
from ..errors import RecipeError
from .recipe import Recipe

NO_DECAY = ("position_embedding", "position_bias", "cls_token", "modality_embedding", "logit_scale", "probe")
MAX_LOGIT_SCALE = math.log(100)  # CLIP, 2103.00020, section 2.5


def freeze_parameters(model: nn.Module, recipe: Recipe) -> list[str]:
    """Turns off the gradient of parameters that the recipe freezes or that none of its losses reaches.

    Returns:
        Names of the latter: joint experts; poolings and projections without the contrastive loss, and experts of
        texts that captions don't share; the caption head and its experts without the caption loss.

    Raises:
        RecipeError: a pattern of `freeze` or `rates` that matches nothing; nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for field, patterns in (("freeze", recipe.freeze), ("rates", recipe.rates)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in names):
                raise RecipeError(
                    f"{field} pattern {quoted(pattern)} matches no parameter: names look like {quoted(names[0])}"
                )
    unreached, own_captions = [], any(".caption." in name for name in names)
    for name, parameter in model.named_parameters():
        if any(_matches(name, pattern) for pattern in recipe.freeze):
            parameter.requires_grad_(False)
        elif parameter.requires_grad and not _is_reached(name, recipe, own_captions):
            parameter.requires_grad_(False)
            unreached.append(name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"freeze={quoted(recipe.freeze)} leaves nothing to train")
    return unreached


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"*{pattern}")


def _is_reached(name: str, recipe: Recipe, own_captions: bool) -> bool:
    """`own_captions`: captions have experts of their own."""
    if re.search(r"\.joint\.|joint_projection|mask_token|multimodal_pooler|matching_head", name):
        return False
    embeds = r"(image|text)_projection|image_pooling|logit_(scale|bias)|text_norm|text_embedding\.cls_token"
    if not recipe.contrastive_weight and re.search(embeds, name):
        return False
    if own_captions and not (recipe.contrastive_weight or recipe.teacher) and ".text." in name:
        return False
    return bool(recipe.caption_weight) or not re.search(r"lm_head|\.caption\.|decoder\.(layers|norm)\.", name)


def depth_of(name: str, num_layers: int) -> int:
    """0 for embeddings, 1 … num_layers for the layers, num_layers + 1 for all above them, a decoder included."""
    if layer := re.search(r"encoder\.layers\.(\d+)\.", name):
        return int(layer.group(1)) + 1
    return 0 if re.search(r"(image|text)_embedding\.|position_bias", name) else num_layers + 1


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """AdamW's groups: a rate per depth (layer-wise decay) and pattern; no weight decay for vectors and positions."""
    num_layers = max(depth_of(name, 0) for name, _ in model.named_parameters())  # of the encoder, the deeper of two
    groups: dict[tuple[int, bool, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depth_of(name, num_layers)
        decays = parameter.ndim >= 2 and not any(part in name for part in NO_DECAY)
        share = next((share for pattern, share in recipe.rates.items() if _matches(name, pattern)), 1.0)
        rate = recipe.learning_rate * share * recipe.layer_decay ** (num_layers + 1 - depth)
        group = {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": recipe.weight_decay if decays else 0.0}
        groups.setdefault((depth if recipe.layer_decay != 1 else 0, decays, share), group)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameter_groups(model, recipe),
        betas=tuple(recipe.betas),
        eps=1e-6,  # CLIP's for its ViT towers: second moments of rare words are tiny
        fused=device.type in ("cpu", "cuda"),
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, recipe: Recipe):
    """Sets the rates of step number `step`, counted from 0."""
    factor = rate_factor(step, steps, recipe)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def rate_factor(step: int, steps: int, recipe: Recipe) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to `final_learning_rate_share`."""
    # Not transformers' cosine schedules: they start at a rate of 0 or fall a step earlier, and a scheduler's state
    # would bring back the old rates when a run is resumed with new ones.
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = min((step - recipe.warmup_steps) / max(steps - recipe.warmup_steps, 1), 1.0)
    final = recipe.final_learning_rate_share
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def clamp_logit_scale(model: nn.Module):
    """Keeps an inverse temperature that learns at 100 or less, as CLIP does; SigLIP, which has a bias, does not."""
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        has_bias = f"{name.removesuffix('scale')}bias" in names
        if name.endswith("logit_scale") and parameter.requires_grad and not has_bias:
            with torch.no_grad():
                parameter.clamp_(max=MAX_LOGIT_SCALE)


class MovingAverage:
    """Exponential moving average of the trained parameters, sharded as they are.

    At step s the decay is at most (1 + s) / (10 + s), so that the initial weights fade quickly.
    """

    # Not torch's AveragedModel: it copies frozen parameters too, and can't take the place of the weights.

    def __init__(self, model: nn.Module, decay: float):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.decay, self.step = decay, 0

    @torch.no_grad()
    def restart(self):
        """Begin anew from the parameters as they are."""
        self.step = 0
        torch._foreach_copy_(self.averages, self.parameters)

    def update(self):
        self.take_in(self.advance())

    def advance(self) -> float:
        """Counts a step; returns what its weights count."""
        self.step += 1
        return 1 - min(self.decay, (1 + self.step) / (10 + self.step))

    @torch.no_grad()
    def take_in(self, weight: float | torch.Tensor):
        """Adds the weights of a step, which count `weight`: a number, or a tensor () on their device."""
        parameters = [parameter.detach() for parameter in self.parameters]
        if isinstance(weight, torch.Tensor):
            differences = torch._foreach_sub(parameters, self.averages)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(self.averages, differences)
        else:
            torch._foreach_lerp_(self.averages, parameters, weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside this context the model's weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for average, parameter in zip(self.averages, self.parameters):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict:
        """Whole tensors instead of shards. Every process has to call it."""
        return {"step": self.step, "averages": [_whole(average) for average in self.averages]}

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        self.step = state["step"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            if isinstance(average, DTensor):
                saved = distribute_tensor(saved.to(average.device), average.device_mesh, average.placements)
            average.copy_(saved)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
