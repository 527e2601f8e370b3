"""SigLIP's tokenizers as fast ones, which need no sentencepiece when they are used, and the ids that captions need.

- v1, from `spiece.model` (Unigram): what transformers' `SiglipTokenizer` does to a text, as a list of normalizers;
- SigLIP 2, from `tokenizer.json` (Gemma's, BPE): lower case, as it was trained (big_vision issues 166 and 187);
- both write `words [EOS]` and pad on the right.

A caption begins with `[BOS]`, which SigLIP's texts don't have: Gemma's vocabulary has one that is never used, v1 gets
a new row in the word embedding, and so does the id that stands for image tokens where no id is free.
"""

import json
import os
import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..configuration_mome import quoted, shortened
from ..errors import ConversionError, first_sentence, missing_package
from .hub import CheckpointFiles

SPACE = "▁"  # SentencePiece's
START = "<|caption|>"  # of captions, where the vocabulary has no [BOS]; unlikely to stand in a text
PUNCTUATION = Regex(r"[!-/:-@\[-`{-~]")  # `string.punctuation`
# What Python's `\s` and `str.strip` take for white space; Oniguruma's `\s` lacks the separators of files to units.
WHITE_SPACE = Regex(
    r"[\t-\r\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]+"
)
FINAL_SIGMA = Regex(r"(?<=\p{L})Σ(?!\p{L})")  # by letters, `str.lower` looks at the next one
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
UNUSED = re.compile(r"<unused\d+>")


def load_siglip_tokenizer(
    files: CheckpointFiles, max_length: int, strip_punctuation: bool = False, path: Path | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a SigLIP checkpoint.

    Args:
        files: of the checkpoint.
        max_length: longest text in tokens.
        strip_punctuation: SigLIP 2 without punctuation, as v1 is in any case.
        path: a tokenizer file or a folder with one, in place of the checkpoint's.

    Raises:
        ConversionError: there is none, or it can't be read.
    """
    if path is not None:
        if not os.path.exists(path):
            raise ConversionError(f"tokenizer {shortened(path)} does not exist: pass its file or folder")
        files = CheckpointFiles(path if os.path.isdir(path) else path.parent)
    names = (path.name,) if path is not None and os.path.isfile(path) else TOKENIZER_FILES
    file = files.need(*names, hint="pass --tokenizer FILE or --no-tokenizer")
    settings_file = files.find("tokenizer_config.json")
    settings = {} if settings_file is None else files.json(settings_file)
    try:
        if file.suffix == ".json":
            backend = Tokenizer.from_file(str(file))
        else:
            backend = unigram(file.read_bytes())
        if isinstance(backend.model, models.Unigram):
            return _tokenizer(*_siglip1(backend, settings.get("do_lower_case", True)), max_length)
        return _tokenizer(*_siglip2(backend, settings, strip_punctuation), max_length)
    except ModuleNotFoundError as error:
        raise ConversionError(f"tokenizer {file}: {missing_package(error, 'convert')}") from error
    except ConversionError:
        raise
    except Exception as error:  # the readers of the formats raise anything
        raise ConversionError(f"tokenizer {file} can't be read: {first_sentence(error)}") from error


def unigram(model: bytes) -> Tokenizer:
    """A SentencePiece model of the Unigram kind as a fast tokenizer: its pieces, and its map of characters.

    Raises:
        ModuleNotFoundError: sentencepiece or protobuf is not installed.
        ConversionError: another kind.
    """
    import google.protobuf  # noqa: F401  sentencepiece needs it for this, and would name something else
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    if not proto.pieces or proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise ConversionError("tokenizer: the SentencePiece model is not of the kind Unigram: pass SigLIP's own")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = next(index for index, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback))
    if characters := proto.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(characters)
    return tokenizer


def _siglip1(backend: Tokenizer, lower_case: bool) -> tuple[Tokenizer, dict]:
    """v1: lower case, no punctuation, single spaces, SentencePiece's own map of characters; one `▁` before it all."""
    state = json.loads(backend.to_str())
    characters = re.search(r'"precompiled_charsmap": ?"([^"]*)"', json.dumps(state["normalizer"]))
    steps = [normalizers.Replace(SPACE, " "), normalizers.Prepend(SPACE)]
    steps += _lower_case() if lower_case else []
    steps += [normalizers.Replace(PUNCTUATION, ""), normalizers.Replace(WHITE_SPACE, " ")]
    steps += [normalizers.Strip(left=False, right=True)]
    if characters:
        steps += _mapped(_normalizer({"type": "Precompiled", "precompiled_charsmap": characters[1]}))
    # SentencePiece leaves out spaces beyond the first, and all at the end.
    steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(f"[ {SPACE}]+$"), "")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never")
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    eos, unknown = "</s>", state["model"]["vocab"][state["model"]["unk_id"]][0]
    for token in (eos, unknown):
        backend.add_special_tokens([AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True)])
    return _ending_texts(backend, eos), {"eos_token": eos, "pad_token": eos, "unk_token": unknown}


def _mapped(characters: normalizers.Normalizer) -> list[normalizers.Normalizer]:
    """SentencePiece's map of characters, for a library that maps a letter with its marks as one.

    It would lose marks that have no entry together with their letter: each is mapped for itself, behind a control
    character that the map removes.
    """
    if characters.normalize_str("\x01") != "":
        return [characters]
    return [normalizers.NFC(), normalizers.Replace(Regex(r"(?=[\p{M}\x{200c}\x{200d}])"), "\x01"), characters]


def _normalizer(state: dict) -> normalizers.Normalizer:
    """One that the library reads but has no constructor for."""
    empty = json.loads(Tokenizer(models.BPE()).to_str())
    return Tokenizer.from_str(json.dumps(empty | {"normalizer": state})).normalizer


def _siglip2(backend: Tokenizer, settings: dict, strip_punctuation: bool) -> tuple[Tokenizer, dict]:
    """SigLIP 2: Gemma's tokenizer in lower case."""
    steps = _lower_case()
    if strip_punctuation:
        steps += [normalizers.Replace(PUNCTUATION, ""), normalizers.Replace(WHITE_SPACE, " "), normalizers.Strip()]
    own = backend.normalizer
    backend.normalizer = normalizers.Sequence(steps if own is None else [*steps, own])
    roles = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>"}
    for role in roles:
        given = settings.get(role)
        roles[role] = (given.get("content") if isinstance(given, dict) else given) or roles[role]
    vocabulary = backend.get_vocab()
    if missing := [role for role in ("eos_token", "pad_token") if roles[role] not in vocabulary]:
        raise ConversionError(f"the tokenizer has no {missing[0]} {quoted(roles[missing[0]])}: pass SigLIP 2's own")
    roles = {role: token for role, token in roles.items() if token in vocabulary}
    if settings.get("add_eos_token", True):
        _ending_texts(backend, roles["eos_token"])
    else:
        backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return backend, roles


def _lower_case() -> list[normalizers.Normalizer]:
    return [normalizers.Replace(FINAL_SIGMA, "ς"), normalizers.Lowercase()]


def _ending_texts(backend: Tokenizer, eos: str) -> Tokenizer:
    special = [(eos, backend.token_to_id(eos))]
    backend.post_processor = processors.TemplateProcessing(single=f"$A {eos}", special_tokens=special)
    return backend


def _tokenizer(backend: Tokenizer, roles: dict[str, str], max_length: int) -> PreTrainedTokenizerFast:
    backend.no_padding()
    backend.no_truncation()
    options = {"model_max_length": max_length, "model_input_names": ["input_ids", "attention_mask"]}
    options |= {"bos_token": START, "padding_side": "right", **roles}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def siglip_token_ids(tokenizer: PreTrainedTokenizerFast | None, words: int) -> dict[str, int]:
    """Fields of the config that name ids; those of `words` and more are new rows of the word embedding.

    Raises:
        ConversionError: a tokenizer with more words than the checkpoint.
    """
    if tokenizer is None:  # v1 and SigLIP 2 agree on [EOS] alone, and it pads v1's texts
        return {"pad_token_id": 1, "eos_token_id": 1, "bos_token_id": words, "image_token_id": words + 1}
    vocabulary = tokenizer.get_vocab()
    highest = max(index for token, index in vocabulary.items() if token != START)
    if highest >= words:
        raise ConversionError(
            f"the tokenizer has ids up to {highest}, the checkpoint {words} words: pass the tokenizer that the "
            "checkpoint was trained with"
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    unused = [index for token, index in vocabulary.items() if UNUSED.fullmatch(token)]
    free = max(unused, default=None)
    if free is None:
        free = next((index for index in reversed(range(words)) if index not in vocabulary.values()), None)
    return ids | {"image_token_id": max(words, ids["bos_token_id"] + 1) if free is None else free}


def with_new_words(table: torch.Tensor, words: int) -> torch.Tensor:
    """(rows, width) → (words, width): a new row is the mean of the others."""
    if words == len(table):
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(words - len(table), -1)])
