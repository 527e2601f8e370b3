"""Upstream checkpoints for the tests of the converters: golden ones, random ones of any size, and tokenizers for them.

`fixtures/beit3.safetensors` and `fixtures/vlmo.safetensors` hold tiny random models of unilm with inputs and outputs;
`a/b` in a key is nesting.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mome.convert.__main__ import main

FIXTURES = Path(__file__).parent / "fixtures"
BEIT3 = {"width": 32, "inner": 48, "layers": 2, "vocab": 100, "image": 16, "patch": 8, "texts": 20}
VLMO = {
    "width": 32,
    "inner": 48,
    "layers": 3,
    "heads": 4,
    "joint": 2,
    "vocab": 100,
    "image": 24,
    "patch": 8,
    "texts": 8,
}
SPECIAL = {
    "beit3": {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    },
    "vlmo": {
        "cls_token": "[CLS]",
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    },
}
# Ids of the special tokens in the golden checkpoints.
GOLDEN_IDS = {
    "beit3": {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 99},
    "vlmo": {"[PAD]": 0, "[CLS]": 11, "[SEP]": 12, "[MASK]": 13, "[UNK]": 14},
}


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries below a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def save_tokenizer(kind: str, folder: Path, vocab_size: int = 100, ids: dict[str, int] | None = None) -> Path:
    """A word-level tokenizer with the special tokens of a kind, and words for the rest: `w5`, …, `a`, `cat`, `dog`."""
    ids = GOLDEN_IDS[kind] if ids is None else ids
    names = [*(f"w{index}" for index in range(vocab_size - 6)), "a", "cat", "dog"]
    words = ids | {name: index for index, name in enumerate(names) if index not in ids.values()}
    roles = SPECIAL[kind]
    first, last = ("bos_token", "eos_token") if kind == "beit3" else ("cls_token", "sep_token")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=roles["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{roles[first]} $A {roles[last]}",
        special_tokens=[(roles[role], words[roles[role]]) for role in (first, last)],
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    return folder


def run(kind, state, folder: Path, *arguments, tokenizer: Path | None = None) -> Path:
    """The folder that the command makes of a state dict."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state}, folder / "upstream.pth")
    tokenizer = save_tokenizer(kind, folder / "tokenizer") if tokenizer is None else tokenizer
    command = [kind, "--checkpoint", str(folder / "upstream.pth"), "--output", str(folder / "out"), *arguments]
    assert main([*command, "--tokenizer", str(tokenizer), "--num-attention-heads", "4"]) == 0
    return folder / "out"
