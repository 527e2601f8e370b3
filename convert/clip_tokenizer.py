"""CLIP's byte-pair tokenizer as a fast one that loads without any code of ours, and cleans texts as open_clip does.

- read from `tokenizer.json`, `vocab.json` with `merges.txt`, or `bpe_simple_vocab_16e6.txt.gz`, or a folder of them;
- HTML entities are resolved, also where they are escaped twice; curly quotes, ligatures and full-width letters
  become plain ones; white space is single; all is lower case;
- texts are padded with `[EOS]`: the id 0 that open_clip pads with is a piece of words with `!`, which would vanish
  from captions if it were a padding token.

What open_clip does beyond that is left out: repairing text that was decoded wrongly, and the rarest HTML entities.
"""

import gzip
import json
import os
from html.entities import name2codepoint
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..configuration_mome import shortened
from ..errors import ConversionError, first_sentence

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "bpe_simple_vocab_16e6.txt.gz")
HINT = "tokenizer.json or vocab.json of any CLIP of OpenAI or LAION, or open_clip's bpe_simple_vocab_16e6.txt.gz"
# What begins and ends a text, by any of the names that its files use.
START, END = ("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")
END_OF_WORD = "</w>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# Entities by number that titles and captions have: punctuation of ASCII, and that of typesetters.
NUMBERED = [
    *(code for code in range(33, 127) if not chr(code).isalnum()),
    160,
    8211,
    8212,
    8216,
    8217,
    8220,
    8221,
    8230,
]
WITHOUT_SEMICOLON = {"lt", "gt", "quot", "nbsp"}
LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st", "Ĳ": "IJ", "ĳ": "ij"}


def find_clip_tokenizer(folder: Path) -> Path:
    """The tokenizer's file in a folder.

    Raises:
        ConversionError: there is none.
    """
    for name in TOKENIZER_FILES:
        if os.path.isfile(folder / name):
            return folder / name
    raise ConversionError(f"no tokenizer in {shortened(folder)}: pass --tokenizer FILE ({HINT}) or --no-tokenizer")


def load_clip_tokenizer(path: Path, max_length: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer in a file or folder, for texts of up to `max_length` tokens.

    Raises:
        ConversionError: no such file, one that can't be read, or a vocabulary that the checkpoint doesn't have.
    """
    if os.path.isdir(path):
        path = find_clip_tokenizer(path)
    if not os.path.isfile(path):
        raise ConversionError(f"tokenizer {shortened(path)} does not exist: pass its file or folder")
    try:
        vocabulary, merges = _read(path)
        _check(path, vocabulary, merges)
        start, end = (next((name for name in names if name in vocabulary), None) for names in (START, END))
        if start is None or end is None:
            raise ConversionError(f"tokenizer {path} is not CLIP's, it has no {START[1]} and {END[1]}: pass {HINT}")
        highest = max(vocabulary.values())
        # Checks that the vocabulary has all that the merges make.
        model = models.BPE(vocabulary, merges, end_of_word_suffix=END_OF_WORD, unk_token=end)
    except ConversionError:
        raise
    except Exception as error:  # not JSON, not gzip, other fields
        raise ConversionError(f"tokenizer {path} can't be read: {first_sentence(error)}") from error
    if highest >= vocab_size:
        raise ConversionError(
            f"tokenizer {path} has ids up to {highest}, the checkpoint {vocab_size} words: pass the tokenizer that "
            "the checkpoint was trained with"
        )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(_cleaning())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    ends = [(start, vocabulary[start]), (end, vocabulary[end])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ends)
    # In the alphabet of bytes, Ġ is a space. The one behind the last word stays, as in open_clip.
    tokenizer.decoder = decoders.Sequence([decoders.Replace(END_OF_WORD, "Ġ"), decoders.ByteLevel()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _check(path: Path, vocabulary: dict[str, int], merges: list[tuple[str, ...]]):
    if not all(type(index) is int and index >= 0 for index in vocabulary.values()):
        raise ConversionError(f"tokenizer {path} has ids that are not whole numbers: download it again")
    if not merges or not all(len(merge) == 2 for merge in merges):
        reason = "merges that are not pairs" if merges else "no merges, it would read letter by letter"
        raise ConversionError(f"tokenizer {path} has {reason}: download it again")


def _read(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges."""
    if path.suffix == ".gz":
        return _from_merges(gzip.decompress(path.read_bytes()).decode("utf-8").split("\n"))
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "vocab.json":
        merges = path.with_name("merges.txt")
        if not merges.is_file():
            raise ConversionError(f"tokenizer {path} has no merges.txt beside it: pass the folder of both")
        lines = merges.read_text(encoding="utf-8").split("\n")
        return content, [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    model = content["model"]
    merges = [tuple(merge.split()) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return model["vocab"] | added, merges


def _from_merges(lines: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """open_clip's file of merges: bytes, bytes that end a word, then a token for each merge, then the two ends."""
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    # Bytes that are printed as themselves come first, then the others, each in order.
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printed] + [chr(256 + number) for number in range(256 - len(printed))]
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *map("".join, merges), START[0], END[0]]
    return {token: number for number, token in enumerate(tokens)}, merges


def _cleaning() -> list[normalizers.Normalizer]:
    """What happens to a text before it is split into words."""
    replace = normalizers.Replace
    steps = [replace(Regex("&amp;?(amp;)?"), "&")]
    for name, code in name2codepoint.items():
        if name != "amp":
            steps.append(replace(Regex(f"&{name};?") if name in WITHOUT_SEMICOLON else f"&{name};", chr(code)))
    steps += [replace(Regex(f"&#(0*{code}|[xX]0*(?i:{code:x}));?"), chr(code)) for code in NUMBERED]
    steps += [replace("&apos;", "'")]
    steps += [replace(Regex("[\u02bc\u2018-\u201b]"), "'"), replace(Regex("[\u201c-\u201f]"), '"')]
    steps += [replace(ligature, letters) for ligature, letters in LIGATURES.items()]
    steps += [replace(chr(code), chr(code - 0xFEE0)) for code in range(0xFF01, 0xFF5F)]  # full width
    steps += [replace(Regex("[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\ufeff]"), ""), normalizers.NFC()]
    return [*steps, replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
