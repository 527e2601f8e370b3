"""Sparse upcycling (2212.05055): a dense checkpoint as a routed one that starts with the same outputs.

Every expert becomes several copies of itself under a new router. A token's weights are renormalised over the experts
that it uses, so that they sum to 1 and the copies give together what the one expert gave. The routers start at random,
so that the copies soon see different tokens and part.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..cards import facts_of, updated
from ..configuration_mome import MomeConfig, shortened
from ..errors import ConversionError, first_sentence
from ..modeling_mome import MomeForConditionalGeneration, MomeModel
from .operations import Conversion
from .reading import open_checkpoint
from .saving import check_output, save_model, whole_folder

# Dense name → routed name; sub-LayerNorm is one for all experts of a group.
EXPERT_MAP = {
    "up_proj.weight": "experts.up_proj",
    "up_proj.bias": "experts.up_proj_bias",
    "down_proj.weight": "experts.down_proj",
    "down_proj.bias": "experts.down_proj_bias",
    "norm.weight": "experts.act_fn.1.weight",
    "norm.bias": "experts.act_fn.1.bias",
}
EXPERT = re.compile(r"(.*\.feed_forward\.(?:image|text|caption|joint)\.)((?:up_proj|down_proj|norm)\.(?:weight|bias))")


def routed_config(config: MomeConfig, experts_per_group: int, experts_per_token: int) -> MomeConfig:
    """The config of the routed checkpoint.

    Raises:
        ConversionError: a number of experts with which the outputs could not stay, or a checkpoint with routers.
    """
    if config.experts_per_group > 1:
        raise ConversionError(
            f"the checkpoint already has {config.experts_per_group} experts per group: pass a dense one"
        )
    if experts_per_group < 2:
        raise ConversionError(f"--experts-per-group {experts_per_group} leaves the router no choice: pass 2 or more")
    if not 2 <= experts_per_token <= experts_per_group:
        raise ConversionError(
            f"--experts-per-token {experts_per_token}: pass 2 to {experts_per_group}; a single expert would be scaled "
            "by its router weight, which changes the outputs"
        )
    fields = config.to_dict() | {"experts_per_group": experts_per_group, "experts_per_token": experts_per_token}
    return MomeConfig.from_dict(fields)


def upcycle(state: dict[str, torch.Tensor], config: MomeConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a dense model → that of the routed `config`. Takes the dense experts out of `state`."""
    generator, routed = torch.Generator().manual_seed(seed), {}
    for key in list(state):
        tensor, match = state.pop(key), EXPERT.fullmatch(key)
        if match is None:
            routed[key] = tensor
            continue
        prefix, name = match.groups()
        shared = name.startswith("norm.")
        routed[prefix + EXPERT_MAP[name]] = tensor if shared else torch.stack([tensor] * config.experts_per_group)
        if name == "up_proj.weight":
            router = torch.randn(config.experts_per_group, config.hidden_size, generator=generator)
            routed[f"{prefix}router.weight"] = (router * config.initializer_range).to(tensor.dtype)
    return routed


def upcycle_checkpoint(folder: Path, output: Path, experts_per_group: int, experts_per_token: int = 2) -> Conversion:
    """Makes a routed checkpoint of a dense MoME one; tokenizer, processor and whatever lies beside come along.

    Raises:
        ConversionError: no MoME checkpoint, or as `routed_config`.
    """
    check_output(output)
    config = _config_of(folder)
    routed = routed_config(config, experts_per_group, experts_per_token)
    files, state = _weight_files(folder), {}
    for file in files:
        opened = open_checkpoint(file)
        state |= {key: opened.tensor(key) for key in opened.shapes}
    model_class = MomeForConditionalGeneration if any(key.startswith("lm_head.") for key in state) else MomeModel
    card = folder / "README.md"
    try:
        state = upcycle(state, routed)
        facts = facts_of(routed, sum(tensor.numel() for tensor in state.values()))
        changed = {name: facts[name] for name in ("parameters", "experts of a modality")}
        with whole_folder(output) as made:
            save_model(model_class, routed, state, made)
            for path in folder.iterdir():
                weights = path in files or path.name == SAFE_WEIGHTS_INDEX_NAME
                if path.is_file() and not weights and not (made / path.name).exists():
                    shutil.copy(path, made)
            if card.is_file():
                text = updated(card.read_text(encoding="utf-8"), str(output), facts=changed)
                (made / card.name).write_text(text, encoding="utf-8")
    except RuntimeError as error:  # of the strict load
        raise ConversionError(f"checkpoint {folder} does not fit its config.json: {first_sentence(error)}") from error
    return Conversion(output, routed)


def _config_of(folder: Path) -> MomeConfig:
    path = folder / CONFIG_NAME
    if not os.path.isfile(path):
        raise ConversionError(
            f"checkpoint {shortened(folder)} is not the folder of a MoME checkpoint: it has no {CONFIG_NAME}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = fields.get("model_type")
        config = MomeConfig.from_dict(fields) if kind == MomeConfig.model_type else None
    except Exception as error:  # not JSON, no object, unknown or impossible fields
        raise ConversionError(
            f"checkpoint {folder}: {CONFIG_NAME} describes no possible model: {first_sentence(error)}"
        ) from error
    if config is None:
        raise ConversionError(f"checkpoint {folder} is a {kind} checkpoint: pass a MoME one")
    return config


def _weight_files(folder: Path) -> list[Path]:
    if os.path.isfile(folder / SAFE_WEIGHTS_NAME):
        return [folder / SAFE_WEIGHTS_NAME]
    if os.path.isfile(folder / SAFE_WEIGHTS_INDEX_NAME):
        names = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values()
        return [folder / Path(name).name for name in sorted(set(names))]
    raise ConversionError(
        f"checkpoint {folder} has no {SAFE_WEIGHTS_NAME}: pass the folder that save_pretrained wrote"
    )
