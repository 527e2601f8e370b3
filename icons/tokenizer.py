"""The processor of models for icons: a WordPiece tokenizer learnt from the texts of the data set, and 64-pixel images.

python -m mome.icons.tokenizer --data DIR --output DIR [--cache DIR] [--vocabulary 6000] [--max-tokens 16]

General English words are learnt from as well, each counted once, so that words which no icon is called by fall into
natural pieces. How texts are spelt before that is in `spelling.py`.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..pictures_mome import MomeImageProcessor
from ..processing_mome import MomeProcessor
from .captions import STYLE_ADJECTIVES
from .palette import NAMES
from .sources import SOURCES, fetch_source
from .spelling import emoji_names, spelling

SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "<image>", "[UNK]", "[MASK]")
SENTENCE = "a an the icon of on in with left right above below to next and {} background at top bottom between"


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, max_tokens: int, emoji: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Lower-case WordPiece of words in one spelling; a text becomes `[BOS] words [EOS]`.

    Args:
        texts: what to learn the pieces from; a text that occurs more often counts more.
        vocabulary: number of ids, special tokens included.
        max_tokens: length of the longest text that a model takes, `[BOS]` and `[EOS]` counted.
        emoji: names by emoji; default: emoji are marks like others.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = spelling(emoji or {})
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL_TOKENS), min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer numbers pieces in another order each time; which pieces there are is always the same.
    learnt = sorted(tokenizer.get_vocab().keys() - set(SPECIAL_TOKENS))
    numbered = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *learnt])}
    tokenizer.model = models.WordPiece(numbered, unk_token="[UNK]")
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        extra_special_tokens=["<image>"],
        model_max_length=max_tokens,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_processor(
    texts: Iterable[str], vocabulary: int, max_tokens: int, side: int = 64, emoji: Mapping[str, str] | None = None
) -> MomeProcessor:
    """The tokenizer, see `train_tokenizer`, beside an image processor for pictures of `side` pixels."""
    image_processor = MomeImageProcessor(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False
    )
    return MomeProcessor(image_processor, train_tokenizer(texts, vocabulary, max_tokens, emoji))


def english_words(cache: Path) -> list[str]:
    """The words of a small English dictionary, lower case, without names and genitives."""
    words = (fetch_source(SOURCES["wamerican-small"], cache) / "dict/american-english-small").read_text().split()
    return [word for word in words if word.isascii() and word.isalpha() and word.islower()]


def texts_to_learn_from(rows: datasets.Dataset, words: Iterable[str] = ()) -> Iterable[str]:
    """All texts of the rows, general words, and the words that captions add to them."""
    for texts in rows["texts"]:
        yield from texts
    yield from words
    frame = " ".join([SENTENCE.replace("{}", ""), *NAMES, *STYLE_ADJECTIVES])
    yield from [frame] * 1000


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that mome.icons.build wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the processor")
    parser.add_argument("--cache", type=Path, help="folder of downloads, as of the build (default: DATA/cache)")
    parser.add_argument("--vocabulary", type=int, default=6000)
    parser.add_argument("--max-tokens", type=int, default=16)
    options = parser.parse_args(arguments)
    files = {"train": str(options.data / "train-*.parquet")}
    rows = datasets.load_dataset("parquet", data_files=files, split="train").select_columns("texts")
    cache = options.cache or options.data / "cache"
    emoji = emoji_names(fetch_source(SOURCES["emojibase-data"], cache))
    texts = texts_to_learn_from(rows, english_words(cache))
    processor = build_processor(texts, options.vocabulary, options.max_tokens, emoji=emoji)
    processor.save_pretrained(options.output)
    print(f"{len(processor.tokenizer):,} tokens in {options.output}")


if __name__ == "__main__":
    main()
