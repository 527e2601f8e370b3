"""Where the Space's model comes from: a checkpoint, or an export in its place."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForImageTextToText, AutoProcessor

from .engine import Engine
from .onnx_engine import OnnxEngine

# Where a deployed Space finds its checkpoint: a repository of the Hub and a revision of it that never moves.
HUB_CHECKPOINT = "mome/mome-icons@v0.1.0"
LOCAL_CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "mome-icons"

WITHOUT_CAPTIONS = ("zero-shot-image-classification", "image-feature-extraction")  # what cards of such models say


def checkpoint_source() -> tuple[str, str | None]:
    """The checkpoint's folder, or its Hub id and revision: `MOME_CHECKPOINT`, the repository's own, or the Hub's.

    Raises:
        ValueError: `MOME_CHECKPOINT` is neither a folder nor `owner/name@revision`.
    """
    given = os.environ.get("MOME_CHECKPOINT")
    if not given and LOCAL_CHECKPOINT.is_dir():
        return str(LOCAL_CHECKPOINT), None
    source = given or HUB_CHECKPOINT
    if Path(source).is_dir():
        return source, None
    repository, _, revision = source.partition("@")
    if repository.count("/") != 1 or not revision:
        raise ValueError(
            f"MOME_CHECKPOINT={source!r} is no folder: give one, or a repository of the Hub with its revision "
            "as owner/name@revision"
        )
    return repository, revision


def load_checkpoint() -> tuple[Any, Any]:
    """The captioner, which embeds as well, and its processor; their code comes with the weights."""
    source, revision = checkpoint_source()
    options = {"trust_remote_code": True} | ({} if revision is None else {"revision": revision})
    processor = AutoProcessor.from_pretrained(source, **options)
    return AutoModelForImageTextToText.from_pretrained(source, **options).eval(), processor


def has_learnt_captions() -> bool:
    """Whether the checkpoint's card says so; one without a card is taken to have.

    The weights don't tell: what was converted from a model of embeddings, as SigLIP, has a caption head all the same.
    """
    source, revision = checkpoint_source()
    try:
        card = Path(source, "README.md")
        card = card if revision is None else Path(hf_hub_download(source, card.name, revision=revision))
        text = card.read_text(encoding="utf-8")
    except (FileNotFoundError, EntryNotFoundError):
        return True
    return ModelCard(text, ignore_metadata_errors=True).data.pipeline_tag not in WITHOUT_CAPTIONS


def load_engine() -> Engine:
    """The checkpoint as the page uses it, or the export in its place."""
    source, _ = checkpoint_source()
    if any(Path(source).glob("onnx/vision_model*.onnx")) and not any(Path(source).glob("*.safetensors*")):
        return OnnxEngine.load(source)
    return Engine(*load_checkpoint(), captions=has_learnt_captions())
