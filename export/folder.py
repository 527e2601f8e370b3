"""From a checkpoint to a folder of ONNX files, checked, whole or not at all.

checkpoint ─ loaded ─┬─ config, tokenizer, processor ──────────────────────────────┐
                     └─ towers, caption step ─ graphs of each type ─ compared ─────┴─ folder
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from ..configuration_coca import CocaConfig
from ..configuration_mome import quoted, shortened
from ..convert.saving import whole_folder
from ..embedder import Embedder
from ..errors import ExportError, first_line
from ..families import FAMILIES, FAMILY_NAMES
from ..onnx_captions import caption_rules
from ..onnx_embedder import (
    DECODER,
    FINGERPRINT,
    JOINT,
    LOGIT_BIAS,
    LOGIT_SCALE,
    SUFFIXES,
    TEXT,
    VISION,
    OnnxEmbedder,
    onnx_file,
    open_session,
)
from .check import Agreement, Checks
from .graphs import graph_of, half, mark, quantised, save
from .modules import BothTowers, CaptionStep, CocaCaptionStep, CocaImageTower, Exportable, ImageTower, TextTower

DTYPES = ("fp32", "q8")
NEEDED = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
COPIED = (*NEEDED, "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
MOST_BYTES = 2**31 - 2**20  # what a file of ONNX can hold


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        output: the folder.
        sizes: name of each ONNX file → bytes.
        agreement: type → how it agrees with the checkpoint.
    """

    output: Path
    sizes: dict[str, int]
    agreement: dict[str, Agreement]


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    dtypes: Sequence[str] = DTYPES,
    progress: Callable[[str], object] = lambda step: None,
) -> Export:
    """Writes the towers, both towers together and, of a captioner, a step of captioning as ONNX.

    Each type is compared with the checkpoint before the folder appears (`mome.export.check`).

    Args:
        checkpoint: folder or Hub id of a MoME checkpoint, dense or routed, or of a CoCa.
        output: folder to make.
        dtypes: of `fp32`, `fp16` and `q8`.
        progress: is told of each step.

    Raises:
        ExportError: an unknown type or none, a checkpoint that is incomplete, too large or of another kind, or a type
            that does not agree with it. MomeError: a checkpoint that can't be loaded; an output that is there.
    """
    dtypes, output = [dtypes] if isinstance(dtypes, str) else list(dict.fromkeys(dtypes)), Path(output)
    if not dtypes:
        raise ExportError(f"dtypes is empty: choose from {', '.join(SUFFIXES)}")
    for dtype in dtypes:
        if dtype not in SUFFIXES:
            raise ExportError(f"dtype {quoted(dtype)}: choose from {', '.join(SUFFIXES)}")
    if os.path.exists(output) or os.path.islink(output):
        raise ExportError(f"output {shortened(output)} exists: choose another --output or remove it")
    source = _folder_of(checkpoint)
    config = _check(source)
    captions = config.architectures == [FAMILIES[type(config).model_type].captioner.__name__]
    if captions:
        caption_rules(source)
    progress(f"loading {checkpoint}")
    embedder = Embedder.load(source, "cpu", captions=captions)
    if 4 * embedder.model.num_parameters() > MOST_BYTES:
        raise ExportError(
            f"{checkpoint} has {embedder.model.num_parameters():,} parameters: a file of ONNX holds 2 GB, about 530 "
            "million parameters"
        )
    with whole_folder(output) as folder:
        _copy_small_files(source, folder)
        agreement = _write_files(embedder, folder, dtypes, progress)
    sizes = {path.name: path.stat().st_size for path in sorted((output / "onnx").iterdir())}
    return Export(output, sizes, agreement)


def parts_of(embedder: Embedder) -> dict[str, Exportable]:
    """The module behind each file."""
    model = getattr(embedder.model, "model", embedder.model)
    parts = {VISION: ImageTower(model), TEXT: TextTower(model), JOINT: BothTowers(model)}
    if model is embedder.model:
        return parts
    if type(embedder.config).model_type == CocaConfig.model_type:
        return parts | {VISION: CocaImageTower(embedder.model), DECODER: CocaCaptionStep(embedder.model)}
    return parts | {VISION: ImageTower(model, key_values=True), DECODER: CaptionStep(embedder.model)}


def _folder_of(checkpoint: str | Path) -> Path:
    if os.path.isdir(checkpoint):
        return Path(checkpoint).resolve()
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(str(checkpoint), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ExportError(f"checkpoint {quoted(checkpoint)}: no such folder, and {first_line(error)}") from None


def _check(folder: Path) -> PreTrainedConfig:
    if os.path.exists(folder / "adapter_config.json"):
        raise ExportError(f"{folder} is an adapter: merge it into its model first (PEFT: merge_and_unload)")
    for name in NEEDED:
        if not (folder / name).exists():
            raise ExportError(f"{folder} has no {name}: save the model and its processor there first")
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError):
        raise ExportError(f"{folder / 'config.json'} is no config: save the model again") from None
    if kind not in FAMILIES:
        raise ExportError(
            f"{folder} holds a model of type {quoted(kind)}: only {FAMILY_NAMES} can be exported; python -m "
            "mome.convert makes one of SigLIP, BEiT-3, VLMo and CoCa checkpoints"
        )
    return FAMILIES[kind].config.from_pretrained(folder)


def _copy_small_files(source: Path, folder: Path):
    """What goes with the files; the image processor also under the name by which transformers.js looks for it."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    images = json.loads((source / "processor_config.json").read_text())["image_processor"]
    images.pop("auto_map", None)
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n", encoding="utf-8")


def properties_of(embedder: Embedder) -> dict[str, str]:
    """What every file tells of the model."""
    model = getattr(embedder.model, "model", embedder.model)
    numbers = {LOGIT_SCALE: model.logit_scale} | ({} if model.logit_bias is None else {LOGIT_BIAS: model.logit_bias})
    return {FINGERPRINT: embedder.fingerprint} | {key: repr(value.item()) for key, value in numbers.items()}


def _write_files(
    embedder: Embedder, folder: Path, dtypes: Sequence[str], progress: Callable[[str], object]
) -> dict[str, Agreement]:
    (folder / "onnx").mkdir()
    properties = properties_of(embedder)
    for part, module in parts_of(embedder).items():
        progress(f"exporting {part}")
        try:
            graph = graph_of(module) if {"fp32", "q8"} & set(dtypes) else None
            for dtype in dtypes:
                path = folder / onnx_file(part, dtype)
                if dtype == "q8":
                    quantised(graph, path)
                else:
                    save(half(module) if dtype == "fp16" else graph, path)
                mark(path, properties)
        except (RuntimeError, TypeError, NotImplementedError) as error:  # those of the exporter
            raise ExportError(f"{part} can't be exported: {first_line(error)}") from error
    progress("comparing with the checkpoint")
    checks, agreement = Checks(embedder), {}
    with torch.inference_mode():
        for dtype in dtypes:
            exported = OnnxEmbedder(folder, dtype, captions=checks.captions is not None)
            agreement[dtype] = checks.of(exported)
            agreement[dtype].check(dtype)
            checks.of_both(open_session(folder / onnx_file(JOINT, dtype)), embedder).check(dtype)
    return agreement


__all__ = ["DTYPES", "Export", "export_checkpoint", "parts_of", "properties_of"]
