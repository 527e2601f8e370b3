"""Small tokenizers and processors made in memory, for all tests."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from mome.processing_mome import MomeProcessor

SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "<image>", "[UNK]", "[MASK]")
WORDS = (
    "a an the photo picture of on with and red green blue yellow black white circle square triangle dot line cat dog"
)


def build_tokenizer(words: list[str] | None = None, max_length: int = 16) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: the special tokens are ids 0 to 5 in the order of `SPECIAL_TOKENS`, then the words."""
    vocabulary = [*SPECIAL_TOKENS, *(WORDS.split() if words is None else words)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        extra_special_tokens=["<image>"],
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_processor(image_size: int = 32, words: list[str] | None = None, max_length: int = 16) -> MomeProcessor:
    """A processor with square images of `image_size` pixels, normalised to -1…1."""
    image_processor = CLIPImageProcessor(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_center_crop=False,
    )
    return MomeProcessor(image_processor, build_tokenizer(words, max_length))
