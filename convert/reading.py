"""Tensors of an untrusted checkpoint file, read when they are asked for.

- safetensors: header first, tensors on demand;
- pickles: `weights_only=True`, so that nothing in the file runs, and mapped into memory where the format allows it;
- wrappers of training frameworks (`model`, `state_dict`, `module`) are taken off.
"""

import argparse
import os
import pickle
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..configuration_mome import quoted, shortened
from ..errors import ConversionError, first_sentence

# What training scripts put around a state dict, and the prefix that some put before its keys.
WRAPPERS = ("state_dict", "module", "model")
PREFIX = "module."


class Checkpoint:
    """The tensors of a file.

    Attributes:
        path: the file.
        bytes: its size.
        shapes: key → shape.
        settings: what the file tells about its training run beside the tensors, as far as it is plain data.
    """

    def __init__(self, path: Path, shapes: dict[str, torch.Size], settings: dict | None = None):
        self.path = path
        self.bytes = path.stat().st_size
        self.shapes = shapes
        self.settings = settings or {}

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor of a key, on the CPU; not to be written to."""
        raise NotImplementedError

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def shape(self, key: str, dimensions: int) -> torch.Size:
        """Raises ConversionError if the key is missing, is empty or has another number of dimensions."""
        if key not in self.shapes:
            raise ConversionError(f"checkpoint {self.path} has no {key}: it is incomplete or of another kind")
        shape = self.shapes[key]
        if len(shape) != dimensions or 0 in shape:
            raise ConversionError(
                f"checkpoint {self.path}: {key} has shape {tuple(shape)}, expected {dimensions} dimensions, none 0"
            )
        return shape


class SafetensorsCheckpoint(Checkpoint):
    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        super().__init__(path, {key: torch.Size(self._file.get_slice(key).get_shape()) for key in self._file.keys()})

    def tensor(self, key: str) -> torch.Tensor:
        return self._file.get_tensor(key)


class PickledCheckpoint(Checkpoint):
    def __init__(self, path: Path):
        state, settings = _unwrap(path, _unpickle(path))
        self._tensors = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
        super().__init__(path, {key: tensor.shape for key, tensor in self._tensors.items()}, settings)
        for key, tensor in self._tensors.items():
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
                raise ConversionError(
                    f"checkpoint {path}: {key} is a sparse or quantized tensor, expected a plain one"
                )
            if tensor.numel() * tensor.element_size() > self.bytes:
                raise ConversionError(
                    f"checkpoint {path}: {key} claims the shape {tuple(tensor.shape)}, more than the file can hold"
                )

    def tensor(self, key: str) -> torch.Tensor:
        return self._tensors[key].detach()


class JoinedCheckpoint(Checkpoint):
    """The tensors of some files, as of one."""

    def __init__(self, parts: list[Checkpoint], name: str):
        self.path, self.bytes, self.settings = Path(name), sum(part.bytes for part in parts), {}
        self._part_of = {key: part for part in parts for key in part.shapes}
        self.shapes = {key: part.shapes[key] for key, part in self._part_of.items()}

    def tensor(self, key: str) -> torch.Tensor:
        return self._part_of[key].tensor(key)


def open_checkpoints(paths: list[Path], name: str) -> Checkpoint:
    """As `open_checkpoint`, of a checkpoint in parts; messages call it `name`."""
    return JoinedCheckpoint([open_checkpoint(path) for path in paths], name)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file, whatever its name: safetensors or a pickle that torch wrote.

    Raises:
        ConversionError: no such file, a truncated one, or a pickle that asks for more than tensors.
    """
    if not os.path.isfile(path):
        reason = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ConversionError(f"checkpoint {shortened(path)} {reason}: pass the file with the weights")
    if path.stat().st_size == 0:
        raise ConversionError(f"checkpoint {path} is empty: download it again")
    try:
        return SafetensorsCheckpoint(path) if _is_safetensors(path) else PickledCheckpoint(path)
    except ConversionError:
        raise
    except Exception as error:  # a damaged file raises nearly anything: RuntimeError, EOFError, KeyError, ...
        raise ConversionError(
            f"checkpoint {path} can't be read, it is truncated or not a checkpoint: {first_sentence(error)}"
        ) from error


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then the header, a JSON object. A pickle starts otherwise."""
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        try:
            with safe_open(path, framework="pt"):
                return True
        except SafetensorError:
            if path.suffix == ".safetensors":
                raise
    return False


def _unpickle(path: Path):
    # What the training scripts keep beside the weights and is plain data: their arguments.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Files of before torch 1.6 can't be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except pickle.UnpicklingError as error:
            if (match := re.search(r"GLOBAL ([\w.]+)", str(error))) is None:
                raise ConversionError(
                    f"checkpoint {path} can't be read, it is damaged or not a checkpoint: torch writes no such file"
                ) from error
            raise ConversionError(
                f"checkpoint {path} was refused, not run: its pickle asks for {match[1]}; if you trust its source, "
                "save its state dict alone and convert that"
            ) from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unwrap(path: Path, content) -> tuple[dict[str, torch.Tensor], dict]:
    settings = {}
    if isinstance(content, dict):
        parameters = content.get("hyper_parameters")  # Lightning's record of the training run
        if isinstance(parameters, dict):
            settings = parameters.get("config", parameters)
        for name in WRAPPERS:
            if isinstance(content.get(name), dict):
                content = content[name]
                break
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"checkpoint {path} contains a {type(content).__name__}, expected a dict of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(
                f"checkpoint {path} contains {quoted(key)} of type {type(value).__name__}, expected a tensor"
            )
    return content, settings if isinstance(settings, dict) else {}
