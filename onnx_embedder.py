"""Embeddings and captions of a folder that `mome.export` made, by ONNX Runtime, without the checkpoint.

    config.json, processor_config.json, tokenizer.json, ...
    onnx/
        vision_model.onnx            pixel_values → image_embeds; of a captioner also present.*, what an image caches
        text_model.onnx              input_ids, attention_mask → text_embeds
        model.onnx                   all three → logits_per_image, logits_per_text, text_embeds, image_embeds
        decoder_model_merged.onnx    input_ids, attention_mask, past_key_values.* → logits, present.*
        vision_model_quantized.onnx  ... and so on for the other types

An `OnnxEmbedder` stands in for an `Embedder` wherever embeddings and greedy captions are wanted. Every file carries
the fingerprint of the weights that it was made of, so that tables of the checkpoint and of its export go together.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch.nn import functional as F

from .configuration_mome import MomeConfig, quoted
from .embedder import BATCH_SIZE, CAPTION_TOKENS, Embedder, check_count, checked_device
from .errors import MomeError, first_line, missing_package
from .families import FAMILIES, FAMILY_NAMES
from .onnx_captions import caption_rules, end_tokens_of, greedy_ids
from .processing_mome import MomeProcessor

VISION, TEXT, JOINT, DECODER = "vision_model", "text_model", "model", "decoder_model_merged"
# What files of a type are called, as transformers.js has it; in the order in which a type is chosen.
SUFFIXES = {"fp32": "", "q8": "_quantized", "fp16": "_fp16"}
PRECISIONS = {"fp32": "float32", "q8": "int8", "fp16": "float16"}
BACKENDS = ("torch", "onnx", *(f"onnx-{dtype}" for dtype in SUFFIXES))
# Keys of a file's metadata: of which weights it is, and the model's numbers of these names.
FINGERPRINT, LOGIT_SCALE, LOGIT_BIAS = "mome_fingerprint", "mome_logit_scale", "mome_logit_bias"
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


def onnx_file(part: str, dtype: str) -> str:
    """Where a part of type `dtype` lies in an exported folder."""
    return f"onnx/{part}{SUFFIXES[dtype]}.onnx"


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds an export and no weights to load."""
    folder = Path(folder)
    return (
        os.path.isdir(folder)
        and any(folder.glob("onnx/vision_model*.onnx"))
        and not any(
            any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
        )
    )


def load_embedder(
    model: str | Path, backend: str | None = None, device: str | torch.device | None = None, captions: bool = False
) -> Embedder:
    """A checkpoint or its export, ready to embed.

    Args:
        model: folder or Hub id.
        backend: `"torch"`; `"onnx"`, or one type of it such as `"onnx-q8"`; default: what the folder holds, torch if
            both.
        device: of torch; default: a GPU if there is one.
        captions: load what captions need, too.

    Raises:
        MomeError: an unknown backend, or a model that can't be loaded.
    """
    if backend not in (None, *BACKENDS):
        raise MomeError(f"backend={quoted(backend)}: choose {', '.join(BACKENDS)}")
    if backend is None:
        backend = "onnx" if is_exported(model) else "torch"
    if backend == "torch":
        return Embedder.load(model, device=device, captions=captions)
    if device is not None and checked_device(device).type != "cpu":
        raise MomeError(f"device={quoted(device)}: an export runs on the CPU, leave the device out or load with torch")
    return OnnxEmbedder.load(model, backend.partition("-")[2] or None, captions)


class OnnxEmbedder(Embedder):
    """An exported model and its processor: images and texts in, embeddings and greedy captions out, on the CPU.

    Several threads may call at the same time.

    Args:
        folder: as `mome.export` writes it.
        dtype: `"fp32"`, `"q8"` or `"fp16"`; default: the first of them that is there.
        captions: load the decoder, too.
        name: folder or Hub id, by which it can be loaded again.

    Raises:
        MomeError: not such a folder; a file that is missing, damaged or of other weights; no ONNX Runtime; with
            `captions`, a generation config that an export can't keep to.
    """

    def __init__(self, folder: Path, dtype: str | None = None, captions: bool = False, name: str = ""):
        kind = MomeConfig.get_config_dict(folder)[0].get("model_type")
        if kind not in FAMILIES:
            raise MomeError(f"it is of type {quoted(kind)}, not {FAMILY_NAMES}")
        self._rules = caption_rules(folder) if captions else None
        self.processor, self.name = MomeProcessor.from_pretrained(folder), name or str(folder)
        self.config = FAMILIES[kind].config.from_pretrained(folder)
        self.dimension = self.config.projection_dim
        self.export_dtype = _dtype_of(folder, dtype)
        parts = (VISION, TEXT, *([DECODER] if captions else []))
        self.files = {part: folder / onnx_file(part, self.export_dtype) for part in parts}
        self.sessions = {part: open_session(file) for part, file in self.files.items()}
        prints = {fingerprint_of(session) for session in self.sessions.values()}
        if len(prints) != 1 or None in prints:
            raise MomeError(f"the files of type {self.export_dtype} in {folder / 'onnx'} are of different exports")
        (self._fingerprint,) = prints
        self._end_tokens = end_tokens_of(folder, self.config)

    @classmethod
    def load(cls, model: str | Path, dtype: str | None = None, captions: bool = False) -> "OnnxEmbedder":
        """Loads an export.

        Args:
            model: folder or Hub id.
            dtype, captions: as for the class.

        Raises:
            MomeError: no such folder or repository, and what the class raises.
        """
        name = str(Path(model).resolve()) if os.path.isdir(model) else str(model)
        try:
            folder = Path(name) if os.path.isdir(name) else _downloaded(name, dtype, captions)
            return cls(folder, dtype, captions, name)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise MomeError(f"export {quoted(name)} can't be loaded: {reason}") from None

    @property
    def file_bytes(self) -> int:
        """The size of the ONNX files that were loaded."""
        return sum(file.stat().st_size for file in self.files.values())

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32  # of what goes in and comes out

    @property
    def precision(self) -> str:
        """Of weights and computation: `"float32"`, `"float16"` or `"int8"`."""
        return PRECISIONS[self.export_dtype]

    @property
    def logit_scale(self) -> float:
        """Log of the inverse temperature, as the model has it."""
        return self._number(LOGIT_SCALE)

    @property
    def logit_bias(self) -> float | None:
        """Of the sigmoid objective, whose scores are each text's own; else `None`."""
        return self._number(LOGIT_BIAS)

    def _number(self, key: str) -> float | None:
        values = self.sessions[VISION].get_modelmeta().custom_metadata_map
        if LOGIT_SCALE not in values:
            raise MomeError(f"{self.name} was exported before files told their {key}: export the checkpoint again")
        return float(values[key]) if key in values else None

    @property
    def fingerprint(self) -> str:
        """That of the checkpoint's weights: an export in any type goes with tables of the checkpoint."""
        return self._fingerprint

    def embed_pixel_values(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, channels, height, width) float32 → (images, dimension) float32, L2-normalised."""
        inputs = {"pixel_values": pixel_values.to("cpu", torch.float32).numpy()}
        (embeds,) = self.sessions[VISION].run(["image_embeds"], inputs)
        return F.normalize(torch.from_numpy(embeds), dim=-1)

    def embed_tokens(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`input_ids` and `attention_mask`, (texts, tokens) int64 → (texts, dimension) float32, L2-normalised."""
        given = {name: inputs[name].cpu().numpy() for name in ("input_ids", "attention_mask")}
        (embeds,) = self.sessions[TEXT].run(["text_embeds"], given)
        return F.normalize(torch.from_numpy(embeds), dim=-1)

    def caption_images(
        self,
        images: Sequence[Any],
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
        max_new_tokens: int = CAPTION_TOKENS,
        **generate: Any,
    ) -> list[str]:
        """Greedy captions, one for each image; arguments and errors as for `Embedder.caption_images`.

        Raises:
            MomeError: the export has no decoder, or none was loaded; any option of `generate()`; a `max_new_tokens`
                that is no number from 1.
        """
        if DECODER not in self.sessions:
            raise MomeError("this export writes no captions: load it with captions=True")
        if generate:
            raise MomeError(
                f"{quoted(next(iter(generate)))}: an export writes greedy captions, load the checkpoint instead"
            )
        check_count("max_new_tokens", max_new_tokens)
        captions = []
        for pixel_values in self.pixel_batches(images, batch_size, "captioning", progress):
            ids = self.caption_ids(pixel_values, max_new_tokens)
            captions += self.processor.post_process_image_text_to_text(ids)
        return captions

    def caption_ids(
        self,
        pixel_values: torch.Tensor,
        max_new_tokens: int = CAPTION_TOKENS,
        prompt: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(images, channels, height, width) float32 → (images, tokens) int64: `[BOS]`, a caption, `[EOS]`, padding.

        Args:
            pixel_values: of the images.
            max_new_tokens: longest caption; at most as many as the model has places for.
            prompt: `input_ids` and `attention_mask` (images, tokens) of what captions begin with, as the processor
                makes them; it comes before the caption in place of `[BOS]`, padding on the left.
        """
        vision, decoder = self.sessions[VISION], self.sessions[DECODER]
        what, how = (pixel_values, max_new_tokens, prompt), self._rules
        return greedy_ids(vision, decoder, self.config, self._end_tokens, *what, how)


def open_session(path: Path, threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU; `threads`: default torch's number.

    Raises:
        MomeError: ONNX Runtime is not installed; the file is missing, cut off or none of ONNX.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MomeError(missing_package(error, "onnx")) from None
    if not path.is_file():
        raise MomeError(f"{path} is missing: export the checkpoint again, with this type")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of classes of its own, all RuntimeError-like, and with several lines
        raise MomeError(f"{path} is no whole ONNX file: {first_line(error)}; export it again") from None


def fingerprint_of(session: Any) -> str | None:
    """Of the weights that a file was made of; `None` for one that `mome.export` has not written."""
    return session.get_modelmeta().custom_metadata_map.get(FINGERPRINT)


def _dtype_of(folder: Path, dtype: str | None) -> str:
    if dtype is not None and dtype not in SUFFIXES:
        raise MomeError(f"dtype={quoted(dtype)}: choose {', '.join(SUFFIXES)}")
    there = [each for each in SUFFIXES if (folder / onnx_file(VISION, each)).is_file()]
    if not there or dtype not in (None, *there):
        wanted = onnx_file(VISION, dtype or "fp32")
        raise MomeError(f"it has no {wanted}" + (f", only type {', '.join(there)}" if there else ""))
    return dtype or there[0]


def _downloaded(repo_id: str, dtype: str | None, captions: bool) -> Path:
    parts = (VISION, TEXT, *([DECODER] if captions else []))
    wanted = [onnx_file(part, dtype or "fp32") for part in parts]
    return Path(snapshot_download(repo_id, allow_patterns=[*SMALL_FILES, *wanted]))


__all__ = [
    "BACKENDS",
    "DECODER",
    "FINGERPRINT",
    "JOINT",
    "LOGIT_BIAS",
    "LOGIT_SCALE",
    "SUFFIXES",
    "TEXT",
    "VISION",
    "OnnxEmbedder",
    "fingerprint_of",
    "is_exported",
    "load_embedder",
    "onnx_file",
    "open_session",
]
