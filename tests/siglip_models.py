"""Random SigLIP checkpoints as transformers writes them, with small tokenizers, for the tests."""

import functools
import json
import random
import tempfile
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import SiglipConfig, SiglipModel

WORDS = (
    "a an the photo picture of on with and red green blue yellow black white circle square triangle dot line cat dog "
    "café naïve straße it's don't three 12 привет мир"
)
SHAPES = {
    "base-like": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "deep": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3},
    # so400m: heads of 72 dimensions, a feed-forward of no round width
    "so400m-like": {"hidden_size": 144, "intermediate_size": 269, "num_hidden_layers": 2, "num_attention_heads": 2},
    "cropped": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
IMAGES = {
    "base-like": {"image_size": 32, "patch_size": 8},
    "deep": {"image_size": 48, "patch_size": 16},
    "so400m-like": {"image_size": 28, "patch_size": 14},
    "cropped": {"image_size": 384, "patch_size": 14},  # 27 patches are 378 pixels
}


@functools.cache
def unigram_model(words: str = WORDS) -> bytes:
    """A SentencePiece model like SigLIP's: Unigram, nmt_nfkc, `<pad>`, `</s>` and `<unk>` first."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("\n".join(" ".join(draw.choices(words.split(), k=draw.randint(2, 9))) for _ in range(2000)))
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=f"{folder}/spiece",
            vocab_size=200,
            hard_vocab_limit=False,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        return Path(f"{folder}/spiece.model").read_bytes()


@functools.cache
def gemma_tokenizer() -> str:
    """A tokenizer.json like Gemma's: BPE over `▁` for spaces, five special tokens, some unused ones."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>", "<unused1>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([WORDS, "Red CIRCLE! The photo, of a dog."] * 20, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer.to_str()


def write_tokenizer(folder: Path, version: int = 1, words: str = WORDS) -> int:
    """Writes the tokenizer's files; returns the number of words."""
    if version == 1:
        (folder / "spiece.model").write_bytes(unigram_model(words))
        return sentencepiece.SentencePieceProcessor(model_proto=unigram_model(words)).get_piece_size()
    (folder / "tokenizer.json").write_text(gemma_tokenizer())
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(json.loads(gemma_tokenizer())["model"]["vocab"])


def random_siglip(shape: str = "base-like", words: int = 300, positions: int = 64, seed: int = 0) -> SiglipModel:
    """Random in every weight, large enough for a wrong mask, pooling or position to show."""
    torch.manual_seed(seed)
    sizes = SHAPES[shape]
    text = sizes | {"vocab_size": words, "max_position_embeddings": positions, "projection_size": sizes["hidden_size"]}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=sizes | IMAGES[shape])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "embedding" in name or "probe" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-1.5)
    return model


def save_siglip(folder: Path, shape: str = "base-like", version: int = 1, words: str = WORDS) -> SiglipModel:
    """A folder as published: weights, config, tokenizer, preprocessor."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_siglip(shape, write_tokenizer(folder, version, words))
    model.save_pretrained(folder)
    side = IMAGES[shape]["image_size"]
    preprocessor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5] * 3,
        "resample": 3 if version == 1 else 2,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model
