"""Models without memory behind their weights, and folders that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_mome import shortened
from ..errors import ConversionError

WORDS, DECODER = "model.text_embedding.word_embeddings.weight", "lm_head.decoder.weight"


def check_output(output: Path):
    """Raises ConversionError if there is something at the place of the output."""
    if os.path.exists(output) or os.path.islink(output):
        raise ConversionError(f"output {shortened(output)} exists: choose another --output or remove it")


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write to that becomes `output` at the end, or vanishes if anything goes wrong."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)  # mkdtemp keeps the folder to its owner, and safetensors its files
        for path in folder.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        check_output(output)
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def meta_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory behind its weights."""
    with torch.device("meta"):
        return model_class(config)


def save_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, torch.Tensor], folder: Path
):
    """Loads a state dict strictly, without copying it, and saves the model with its code."""
    model = meta_model(model_class, config)
    if DECODER not in state and WORDS in state and DECODER in model.state_dict():
        state = state | {DECODER: state[WORDS]}
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.eval().save_pretrained(folder)
