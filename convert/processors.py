"""The processor of a converted checkpoint: its tokenizer, from any of the files that hold one, and its images.

- SentencePiece models (`beit3.spm`) as XLM-RoBERTa reads them, `vocab.txt` as BERT does, `tokenizer.json`, a folder;
- all become one kind of tokenizer, which writes `[BOS] words [EOS]` and loads without any code of ours;
- images are resized to a square and scaled to −1…1; those of ImageNet classifiers are cropped from the centre and
  normalised by ImageNet's mean and deviation.
"""

import contextlib
import io
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

from PIL import Image
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast, XLMRobertaTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from ..configuration_mome import quoted, shortened
from ..errors import ConversionError, first_sentence, missing_package
from ..pictures_mome import MomeImageProcessor
from ..processing_mome import MomeProcessor
from .hub import CheckpointFiles
from .operations import Sizes, Source

# Roles of special tokens and the names under which tokenizers have them.
ROLES = {
    "bos_token": ("<s>", "[CLS]", "[BOS]", "<bos>"),
    "eos_token": ("</s>", "[SEP]", "[EOS]", "<eos>"),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
    "mask_token": ("<mask>", "[MASK]"),
}
# BERT's classifier and separator tokens begin and end a text, but it doesn't call them so.
INSTEAD = {"bos_token": "cls_token", "eos_token": "sep_token"}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def find_tokenizer(source: Source, checkpoint: Path) -> Path:
    """The tokenizer beside a checkpoint.

    Raises:
        ConversionError: there is none.
    """
    for name in source.tokenizer_files:
        if (path := checkpoint.parent / name).is_file():
            return path
    raise ConversionError(
        f"no tokenizer beside {shortened(checkpoint)}: pass --tokenizer FILE ({source.tokenizer_hint}) or "
        "--no-tokenizer"
    )


def load_tokenizer(path: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer in a file or folder.

    Raises:
        ConversionError: it cannot be read, or it lacks special tokens or doesn't put them around a text.
    """
    if not os.path.exists(path):
        raise ConversionError(f"tokenizer {shortened(path)} does not exist: pass its file or folder")
    try:
        with _quiet():
            loaded = _read(path)
    except ModuleNotFoundError as error:
        raise ConversionError(f"tokenizer {path}: {missing_package(error, 'convert')}") from error
    except Exception as error:  # the readers of the formats raise anything
        raise ConversionError(f"tokenizer {path} can't be read: {first_sentence(error)}") from error
    roles = {role: _token(loaded, role) for role in ROLES}
    for role, token in roles.items():
        if token is None:
            raise ConversionError(f"tokenizer {path} has no {role}: pass the one that the checkpoint was trained with")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=loaded.backend_tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **roles,
    )
    ids = tokenizer("a").input_ids
    if ids[0] != tokenizer.bos_token_id or ids[-1] != tokenizer.eos_token_id:
        raise ConversionError(
            f"tokenizer {path} does not put {roles['bos_token']} and {roles['eos_token']} around a text: pass another"
        )
    return tokenizer


def _read(path: Path):
    if os.path.isdir(path):
        return AutoTokenizer.from_pretrained(path)
    if path.suffix == ".json":
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    if path.suffix == ".txt":
        return BertTokenizer(vocab=str(path))
    for package in ("sentencepiece", "google.protobuf"):
        __import__(package)  # transformers would go on without them and fail elsewhere
    with tempfile.TemporaryDirectory() as folder:  # the name by which transformers knows a SentencePiece model
        shutil.copy(path, Path(folder) / "sentencepiece.bpe.model")
        return XLMRobertaTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def _quiet():
    """Without the advice that transformers gives on its way to an error, which says the same."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _token(tokenizer: PreTrainedTokenizerFast, role: str) -> str | None:
    named = getattr(tokenizer, role, None) or getattr(tokenizer, INSTEAD.get(role, role), None)
    if named is not None:
        return named
    vocabulary = tokenizer.get_vocab()
    return next((name for name in ROLES[role] if name in vocabulary), None)


def special_token_ids(tokenizer: PreTrainedTokenizerFast | None, source: Source, vocab_size: int) -> dict[str, int]:
    """Fields of the config that name ids, the one that stands for image tokens included.

    Without a tokenizer they are those of the published vocabulary or, for another one, the first ids and the last.
    """
    if tokenizer is None:
        ids = dict(source.special_tokens)
        if vocab_size != source.vocab_size:
            ids = dict(source.other_special_tokens, mask_token_id=vocab_size - 1)
        return ids | {"image_token_id": _spare_id(set(ids.values()), vocab_size)}
    names = ("pad", "bos", "eos", "mask")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    vocabulary = tokenizer.get_vocab()
    if (highest := max(vocabulary.values())) >= vocab_size:
        raise ConversionError(
            f"the tokenizer has ids up to {highest}, the checkpoint {vocab_size} words: pass the tokenizer that the "
            "checkpoint was trained with"
        )
    unused = [index for token, index in vocabulary.items() if re.fullmatch(r"\[unused\d+\]|<image>", token)]
    used = set(vocabulary.values()) - set(unused)
    # Where all ids are words, [MASK]: in a caption it only ever stands behind the text, where the model puts it.
    return ids | {"image_token_id": ids["mask_token_id"] if len(used) >= vocab_size else _spare_id(used, vocab_size)}


def _spare_id(used: set[int], vocab_size: int) -> int:
    return next((index for index in reversed(range(vocab_size)) if index not in used), vocab_size - 1)


def published_image_processor(files: CheckpointFiles, side: int, new_side: int) -> ImageProcessingMixin:
    """What turns images into pixels, as the checkpoint's `preprocessor_config.json` says; images become squares.

    Args:
        side: pixels of the checkpoint's images.
        new_side: of the output's.

    Raises:
        ConversionError: no such file, one that is for other images, or values with which no image can be prepared.
    """
    file = files.need("preprocessor_config.json", "processor_config.json", hint="it tells how images are prepared")
    fields = files.json(file)
    fields = fields.get("image_processor", fields)
    size = fields.get("size", side)
    sides = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if sides != (side, side):
        raise ConversionError(
            f"checkpoint {files.name}: {file.name} makes images of size {size}, config.json has {side} × {side} pixels"
        )
    names = "do_resize do_rescale do_normalize rescale_factor resample image_mean image_std".split()
    options = {name: fields[name] for name in names if fields.get(name) is not None}
    options = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} | options  # where SigLIP's class has its defaults
    what = f"checkpoint {files.name}: {file.name}"
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not isinstance(options.get(name, True), bool):
            raise ConversionError(f"{what}: {name}={quoted(options[name])}, expected true or false")
    try:
        images = MomeImageProcessor(size={"height": new_side, "width": new_side}, do_center_crop=False, **options)
        with warnings.catch_warnings():  # of a division by 0: the error below says what is wrong
            warnings.simplefilter("ignore")
            pixels = images(Image.linear_gradient("L").convert("RGB"), return_tensors="pt")["pixel_values"]
    except Exception as error:  # a value that can't be
        raise ConversionError(f"{what} prepares no image: {first_sentence(error)}") from error
    if pixels.shape[1:] != (3, new_side, new_side) or not pixels.isfinite().all():
        raise ConversionError(f"{what} makes no pixels of {new_side} × {new_side} of an image: {options}")
    return images


def build_processor(tokenizer: PreTrainedTokenizerFast | None, sizes: Sizes) -> MomeProcessor | ImageProcessingMixin:
    """What turns images and texts into the model's inputs; without a tokenizer only what turns images."""
    side = sizes.config["image_size"]
    square = {"height": side, "width": side}
    if sizes.classifier:
        options = {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True, **IMAGENET}
    else:
        options = {"size": square, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = MomeImageProcessor(**options)
    return images if tokenizer is None else MomeProcessor(images, tokenizer)
