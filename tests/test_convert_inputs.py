"""Converted checkpoints take texts, images and resolutions as upstream does."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor

import mome
from mome.benchmarks.layouts import beit3_shapes, random_state, vlmo_shapes
from mome.convert import ConversionError, convert
from mome.convert.operations import Options
from mome.convert.positions import resize_offsets
from upstream import BEIT3, FIXTURES, VLMO, run, save_tokenizer


def train_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cat sees a dog", "the dog sees the red cat", "a white dog"] * 20),
        model_writer=model,
        vocab_size=33,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_sentencepiece_model_gets_the_ids_of_xlm_roberta(tmp_path):
    """Pieces move by one and three of them become <s>, <pad>, </s>, <unk>; <mask> comes last."""
    pieces = train_sentencepiece(tmp_path / "beit3.spm")
    state = random_state(beit3_shapes(**BEIT3 | {"vocab": 40}))
    torch.save(state, tmp_path / "upstream.pth")
    options = Options(num_attention_heads=4)
    convert("beit3", tmp_path / "upstream.pth", tmp_path / "out", options=options)  # found beside the checkpoint
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    text = "the red cat"
    expected = [0, *(piece + 1 for piece in pieces.encode(text)), 2]
    assert processor(text=text)["input_ids"][0] == expected
    assert processor.tokenizer.decode(expected, skip_special_tokens=True) == text
    config = mome.MomeConfig.from_pretrained(tmp_path / "out")
    assert config.mask_token_id == pieces.get_piece_size() + 1 and config.image_token_id == 39
    assert processor.tokenizer.model_max_length == config.max_position_embeddings == 18


def test_berts_vocabulary_is_read_as_bert_reads_it(tmp_path):
    words = ["[PAD]", *(f"[unused{index}]" for index in range(5)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["a", "red", "dog", "##s", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    state = random_state(vlmo_shapes(**VLMO | {"vocab": len(words)}))
    torch.save(state, tmp_path / "upstream.pth")
    convert("vlmo", tmp_path / "upstream.pth", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    batch = processor(text="A red DOGS!")
    assert batch["input_ids"] == [[7, 10, 11, 12, 13, 14, 8]] and set(batch) == {"input_ids", "attention_mask"}
    assert processor.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "a red dogs!"
    config = mome.MomeConfig.from_pretrained(tmp_path / "out")
    assert config.image_token_id == 5  # [unused4]: all other ids are words
    assert config.max_position_embeddings == 196 and processor.tokenizer.model_max_length == 8


def test_a_foreign_tokenizer_for_a_published_vocabulary_is_remarked_on(tmp_path, capsys):
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 99}
    run("beit3", random_state(beit3_shapes(**BEIT3 | {"vocab": 64010})), tmp_path, tokenizer=None)
    assert "published BEiT-3, which has mask_token_id 64001" in capsys.readouterr().out
    tokenizer = save_tokenizer("beit3", tmp_path / "own", 64010, words | {"<mask>": 64001})
    state = random_state(beit3_shapes(**BEIT3 | {"vocab": 64010}))
    folder = run("beit3", state, tmp_path / "right", tokenizer=tokenizer)
    assert (
        "published BEiT-3" not in capsys.readouterr().out
        and "published BEiT-3" not in (folder / "README.md").read_text()
    )


def test_a_tokenizer_file_equals_its_folder(tmp_path):
    state = random_state(beit3_shapes(**BEIT3))
    whole = run("beit3", state, tmp_path / "whole")
    tokenizer = save_tokenizer("beit3", tmp_path / "tokenizer") / "tokenizer.json"
    single = run("beit3", state, tmp_path / "single", tokenizer=tokenizer)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (whole / name).read_text() == (single / name).read_text()


@pytest.mark.parametrize("kind, classifier", [("retrieval", False), ("imagenet", True)])
def test_images_are_prepared_as_upstream_does(kind, classifier, tmp_path):
    folder = run("beit3", random_state(beit3_shapes(**BEIT3, kind=kind)), tmp_path)
    image = Image.effect_noise((40, 24), 90).convert("RGB")
    pixels = AutoProcessor.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"][0]
    if classifier:
        image = image.resize((26, 16), Image.Resampling.BICUBIC).crop((5, 0, 21, 16))
        mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    else:
        image, mean, deviation = image.resize((16, 16), Image.Resampling.BICUBIC), [0.5] * 3, [0.5] * 3
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (mean, deviation))
    assert_close(pixels, (expected - mean) / deviation, atol=1e-5, rtol=0)


# Another resolution.


@torch.no_grad()
def test_absolute_positions_are_resized_bicubically(tmp_path):
    state = random_state(beit3_shapes(**BEIT3 | {"image": 24}))
    folder = run("beit3", state, tmp_path, "--image-size", "40")
    config = mome.MomeConfig.from_pretrained(folder)
    assert config.image_size == 40 and AutoProcessor.from_pretrained(folder).image_processor.size["height"] == 40
    table = load_file(folder / "model.safetensors")["model.image_embedding.position_embedding"][0]
    upstream = state["beit3.encoder.embed_positions.A.weight"]
    assert torch.equal(table[0], upstream[2])
    grid = upstream[3:].T.reshape(1, 32, 3, 3)
    expected = F.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert_close(table[1:], expected)
    assert AutoModel.from_pretrained(folder)(pixel_values=torch.randn(1, 3, 40, 40)).image_embeds.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("side", [2, 5])
def test_relative_positions_are_resized_and_the_rest_of_the_table_stays(side, tmp_path):
    state = random_state(vlmo_shapes(**VLMO))
    folder = run("vlmo", state, tmp_path, "--image-size", str(side * 8))
    table = load_file(folder / "model.safetensors")["model.encoder.position_bias.table"]
    upstream = state["relative_position_bias_table"]
    assert table.shape == ((2 * side - 1) ** 2 + 5 + 2 * 196, upstream.shape[1])
    assert torch.equal(table[(2 * side - 1) ** 2 :], upstream[25:])
    model = AutoModel.from_pretrained(folder)
    batch = {"pixel_values": torch.randn(1, 3, side * 8, side * 8), "input_ids": torch.tensor([[11, 20, 12]])}
    assert model.get_multimodal_features(**batch).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("old, new", [(14, 24), (14, 30), (7, 12), (4, 6)])
def test_resized_biases_keep_near_offsets_and_symmetries(old, new):
    biases = torch.randn((2 * old - 1) ** 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = resize_offsets(biases, old, new).reshape(2 * new - 1, 2 * new - 1, 3)
    known = biases.reshape(2 * old - 1, 2 * old - 1, 3)
    # The steps of the known offsets start at 1, so that the offsets −1, 0 and 1 are among them.
    assert_close(grid[new - 2 : new + 1, new - 2 : new + 1], known[old - 2 : old + 1, old - 2 : old + 1])
    # The farthest known offset lies at the new edge.
    assert_close(grid[0, 0], known[0, 0], atol=1e-3, rtol=0)
    mirrored = resize_offsets(known.flip(0, 1).reshape(-1, 3), old, new)
    assert_close(mirrored.reshape(grid.shape).flip(0, 1), grid)
    swapped = resize_offsets(known.transpose(0, 1).reshape(-1, 3), old, new)
    assert_close(swapped.reshape(grid.shape).transpose(0, 1), grid)
    constant = resize_offsets(torch.full_like(biases, 0.7), old, new)
    assert_close(constant, torch.full_like(constant, 0.7))


def test_biases_are_resized_as_the_routine_of_upstream_does():
    """`fixtures/vlmo_positions.safetensors`: tables, and what `scipy.interpolate.interp2d` of 1.11 made of them."""
    tables = load_file(FIXTURES / "vlmo_positions.safetensors")
    for name in ("4_6", "14_24", "14_10"):
        old, new = map(int, name.split("_"))
        assert_close(resize_offsets(tables[f"{name}/known"], old, new), tables[f"{name}/resized"], atol=1e-12, rtol=0)


def test_the_resolution_of_a_relative_table_comes_from_whatever_tells_it(tmp_path, capsys):
    state = random_state(
        vlmo_shapes(**VLMO | {"longest": 20, "image": 16})
    )  # 16 px would be 8, 16, 24 or 32 px as well
    assert config_of(run("vlmo", state, tmp_path / "guessed")).image_size != 16
    assert "--checkpoint-image-size" in capsys.readouterr().out
    told = run("vlmo", state, tmp_path / "told", "--checkpoint-image-size", "16")
    indexed = run("vlmo", state | {"relative_position_index": torch.zeros(5, 5)}, tmp_path / "indexed")
    torch.save({"state_dict": state, "hyper_parameters": {"config": {"image_size": 16}}}, tmp_path / "lightning.ckpt")
    convert("vlmo", tmp_path / "lightning.ckpt", tmp_path / "lightning", tokenizer=tmp_path / "told" / "tokenizer")
    assert "would fit too" not in capsys.readouterr().out
    for folder in (told, indexed, tmp_path / "lightning"):
        config = config_of(folder)
        assert (config.image_size, config.max_position_embeddings) == (16, 20)
    with pytest.raises(ConversionError, match="fits images of 8, 16, 24 pixels, not 48"):
        options = Options(checkpoint_image_size=48)
        convert("vlmo", tmp_path / "lightning.ckpt", tmp_path / "x", tmp_path / "told" / "tokenizer", options=options)


def config_of(folder: Path) -> mome.MomeConfig:
    return mome.MomeConfig.from_pretrained(folder)
