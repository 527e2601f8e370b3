"""Texts to token ids, by the same rules wherever texts are read.

- too long: cut to what the model reads, `[EOS]` kept, with one warning that names the limit;
- without a word that the tokenizer knows ("!!!", "слон"): refused, for all of them would have one embedding;
- equal ids: labels that are one to the model ("Bacon", "bacon") share their probability, which a warning says;
- a fast tokenizer keeps how it pads and cuts as a state: only one thread at a time may use it.

    texts ── tokenize_texts ──┬─ input_ids, attention_mask
                              └─ which were cut
"""

import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import BatchEncoding
from transformers.utils import logging

from .configuration_mome import quoted

logger = logging.get_logger(__name__)

UNLIMITED_LENGTH = 1_000_000  # a tokenizer without a length limit carries a huge model_max_length

TOKENIZING = threading.RLock()  # held while a tokenizer is used
if hasattr(os, "register_at_fork"):  # a child has no thread that could give it back
    os.register_at_fork(
        before=TOKENIZING.acquire, after_in_parent=TOKENIZING.release, after_in_child=TOKENIZING.release
    )


def longest_text(tokenizer: Any, config: Any) -> int:
    """The most tokens of a text, `[BOS]` and `[EOS]` counted, that both the tokenizer and the model take."""
    return min(tokenizer.model_max_length, config.max_position_embeddings)


def check_characters(texts: Iterable[str]):
    """Raises ValueError for a text with half of a surrogate pair, which is what broken bytes become: no tokenizer
    takes it."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = text[error.start]
            raise ValueError(
                f"text {number} is {quoted(text, 40)}, and {found!r} is no character: read it again as UTF-8"
            ) from None


def tokenize_texts(tokenizer: Any, texts: list[str], limit: int) -> tuple[BatchEncoding, list[int]]:
    """Texts as model inputs, those of more than `limit` tokens cut to `limit`, `[EOS]` kept; and which were cut.

    Returns:
        `input_ids`, `attention_mask` (texts, tokens) int64, padded; the numbers of the texts that were cut.

    Raises:
        ValueError: a text that is no Unicode.
    """
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    check_characters(texts)
    with TOKENIZING:
        inputs = tokenizer(texts, max_length=limit + 1, **options)  # one token more shows what is too long
        if inputs["input_ids"].shape[1] <= limit:
            return inputs, []
        cut = (inputs["attention_mask"].sum(dim=1) > limit).nonzero().flatten().tolist()
        return tokenizer(texts, max_length=limit, **options), cut


def warn_of_cut_texts(count: int, limit: int, what: str = "text"):
    """One warning for all texts that were cut in a call."""
    if count:
        texts = f"1 {what} has" if count == 1 else f"{count} {what}s have"
        logger.warning(f"{texts} more than {limit} tokens, the most that the model reads: the rest is cut off")


def wordless_texts(tokenizer: Any, input_ids: Iterable[Iterable[int]]) -> list[int]:
    """The numbers of the texts of which the tokenizer knows nothing: `[UNK]`, or nothing between `[BOS]` and `[EOS]`.

    Args:
        input_ids: (texts, tokens) int64, or lists of ids.
    """
    roles = ("bos", "eos", "cls", "sep", "pad", "unk")
    empty = {getattr(tokenizer, f"{role}_token_id") for role in roles}
    return [number for number, row in enumerate(input_ids) if all(int(token) in empty for token in row)]


def no_words(text: str, what: str) -> str:
    """What an error or a warning says of a text of `wordless_texts`; `what` names it."""
    return f"{what} is {quoted(text, 40)}, which has no word that the tokenizer knows: say it in other words"


def warn_of_equal_labels(labels: Sequence[str], input_ids: Sequence[Any]):
    """One warning that names labels which are one and the same to the model.

    Args:
        labels: as they were given.
        input_ids: of each label something hashable, equal where the ids of its texts are.
    """
    groups: dict[Any, list[str]] = {}
    for label, ids in zip(labels, input_ids, strict=True):
        groups.setdefault(ids, []).append(label)
    equal = [" = ".join(map(quoted, group)) for group in groups.values() if len(group) > 1]
    if equal:
        shown = "; ".join(equal[:5]) + (f" and {len(equal) - 5} more" if len(equal) > 5 else "")
        logger.warning(f"labels with the same tokens share their probability: {shown}")


def ids_of_texts(inputs: BatchEncoding) -> list[tuple[int, ...]]:
    """Of each text its ids without padding."""
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist())
    return [tuple(token for token, seen in zip(*row) if seen) for row in rows]


__all__ = [
    "TOKENIZING",
    "UNLIMITED_LENGTH",
    "check_characters",
    "ids_of_texts",
    "longest_text",
    "no_words",
    "tokenize_texts",
    "warn_of_cut_texts",
    "warn_of_equal_labels",
    "wordless_texts",
]
