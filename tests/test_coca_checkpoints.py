"""CoCa from file to use: conversion, saving, pipelines, the command, the one embedding loop, publishing, training."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForZeroShotImageClassification, AutoProcessor
from transformers import pipeline as stock_pipeline

import mome
import reference
from loopback_hub import LoopbackHub
from models import coca_batch, tiny_coca
from mome import cli
from mome.benchmarks.layouts import coca_config, coca_shapes, random_state
from mome.convert.__main__ import main
from mome.convert.clip_tokenizer import load_clip_tokenizer
from mome.convert.coca import build_processor
from mome.embedder import Embedder
from mome.publish import build_folder
from upstream import golden, under

CLOSE = {"atol": 1e-5, "rtol": 0}
GOLDEN = {"vision_width": 64, "vision_layers": 2, "patch": 8, "width": 32, "layers": 2, "vocab": 100, "image": 32}
GOLDEN |= {"texts": 12, "queries": 9}
SHAPES = [
    {"vision_width": 48, "vision_layers": 3, "patch": 4, "width": 32, "layers": 1, "vocab": 70, "image": 12}
    | {"texts": 9, "queries": 3},
    {"vision_width": 32, "vision_layers": 1, "patch": 16, "width": 32, "layers": 3, "vocab": 41, "image": 32}
    | {"texts": 30, "queries": 17},
]
WORDS = "a photo of red blue dog cat square".split()


def config_of(sizes: dict, **changes) -> dict:
    """open_clip's config with heads that the widths don't tell."""
    config = coca_config(**sizes, head_dim=16)
    model = config["model_cfg"]
    model["vision_cfg"]["attn_pooler_heads"] = model["text_cfg"]["heads"] = model["multimodal_cfg"]["heads"] = 4
    for path, value in changes.items():
        part, key = path.split("__")
        model[part][key] = value
    return config


def save_clip_tokenizer(folder: Path, vocab_size: int = 560) -> Path:
    """`vocab.json` and `merges.txt` of a byte-pair tokenizer that knows a few words, its two ends last."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    merges = list(dict.fromkeys(merges))
    letters.remove("!")
    tokens = ["!", *letters, "!</w>", *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys(tokens))
    tokens += [f"unused{number}" for number in range(vocab_size - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))
    return folder


def write_upstream(folder: Path, sizes: dict, state: dict | None = None, name: str = "open_clip_model.safetensors"):
    """Weights, config and tokenizer as open_clip pushes them; returns the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = random_state(coca_shapes(**sizes), scale=0.2) if state is None else state
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    (folder / "open_clip_config.json").write_text(json.dumps(config_of(sizes)))
    return state


def run(*arguments) -> int:
    return main(["coca", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A converted random CoCa with a tokenizer."""
    folder = tmp_path_factory.mktemp("coca")
    sizes = {**GOLDEN, "vocab": 560, "texts": 16}
    write_upstream(folder / "upstream", sizes, name="open_clip_pytorch_model.bin")
    save_clip_tokenizer(folder / "upstream")
    assert run("--checkpoint", folder / "upstream", "--output", folder / "converted") == 0
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (50, 40), colour).save(folder / f"{name}.png")
    return folder / "converted"


# ------------------------------------------------------------------------------------------------------- conversion


@torch.no_grad()
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "epoch_1.pt"])
def test_the_golden_checkpoint_gives_what_open_clip_gives(name, tmp_path):
    expected = golden("coca")
    state = under("sd/", expected)
    if name.endswith(".pt"):  # as open_clip's training writes it
        state = {"epoch": 1, "name": "run", "state_dict": {f"module.{key}": each for key, each in state.items()}}
    write_upstream(tmp_path, GOLDEN, state, name)
    command = "--checkpoint", tmp_path / name, "--output", tmp_path / "out", "--no-tokenizer"
    assert run(*command) == 0
    captioner = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    images, ids = expected["image"], expected["input_ids"]
    outputs, image = model(pixel_values=images, input_ids=ids), model.get_image_features(images)
    assert_close(outputs.image_embeds, expected["image_embeds"], **CLOSE)
    assert_close(image.last_hidden_state[:, 1:], expected["image_tokens"], **CLOSE)
    assert_close(outputs.text_embeds, expected["text_embeds"], **CLOSE)
    assert_close(model.get_text_features(ids).last_hidden_state, expected["text_tokens"], **CLOSE)
    assert_close(captioner(pixel_values=images, input_ids=ids).logits, expected["logits"], **CLOSE)
    assert torch.equal(captioner.generate(pixel_values=images, max_new_tokens=6), expected["greedy"])
    beams = captioner.generate(pixel_values=images, max_new_tokens=9, num_beams=3)
    assert torch.equal(beams, expected["beam"])


@torch.no_grad()
@pytest.mark.parametrize("sizes", SHAPES, ids=["apart", "one width"])
@pytest.mark.parametrize("corrected", [False, True])
def test_models_of_other_sizes_give_what_the_mathematics_gives(sizes, corrected, tmp_path):
    state = write_upstream(tmp_path, sizes)
    config = config_of(sizes, text_cfg__correct_cls_mask=corrected, text_cfg__heads=2, multimodal_cfg__heads=8)
    (tmp_path / "config.json").write_text(json.dumps(config["model_cfg"]))  # as in open_clip's model_configs
    command = "--checkpoint", tmp_path / "open_clip_model.safetensors", "--config", tmp_path / "config.json"
    assert run(*command, "--output", tmp_path / "out", "--no-tokenizer") == 0
    captioner = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    heads = {"vision": sizes["vision_width"] // 16, "pooler": 4, "text": 2, "decoder": 8}
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, sizes["image"], sizes["image"], generator=generator)
    ids = torch.randint(1, sizes["vocab"] - 2, (3, sizes["texts"]), generator=generator)
    ids[0, 5:], ids[1, 3] = 0, 0  # padding, and the filler as a word
    expected = reference.coca(state, heads, images, ids, corrected)
    outputs = captioner(pixel_values=images, input_ids=ids)
    assert_close(outputs.logits, expected["logits"], **CLOSE)
    assert_close(outputs.image_embeds, expected["image_embeds"], **CLOSE)
    for given in (ids, ids[:1, :5]):
        embeds = captioner.get_text_features(given).pooler_output
        assert_close(embeds, expected["text_embeds"][: len(given)], **CLOSE)


def test_heads_without_a_config_are_those_of_the_published_width(tmp_path, capsys):
    sizes = {"vision_width": 768, "vision_layers": 1, "patch": 32, "width": 512, "layers": 1, "vocab": 120}
    state = random_state(coca_shapes(**sizes, image=64, texts=8, queries=4))
    save_file(state, tmp_path / "open_clip_model.safetensors")
    command = "--checkpoint", tmp_path / "open_clip_model.safetensors", "--output", tmp_path / "out"
    assert run(*command, "--no-tokenizer") == 0
    config = mome.CocaConfig.from_pretrained(tmp_path / "out")
    parts = "vision pooler text decoder".split()
    assert [getattr(config, f"{part}_num_attention_heads") for part in parts] == [12, 8, 8, 8]
    assert "numbers of heads are those of the published model" in capsys.readouterr().out
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (118, 119, 119)


def test_a_dtype_of_half_precision_stays(tmp_path):
    state = {key: each.half() for key, each in random_state(coca_shapes(**GOLDEN)).items()}
    write_upstream(tmp_path, GOLDEN, state)
    assert run("--checkpoint", tmp_path, "--output", tmp_path / "out", "--no-tokenizer") == 0
    assert {each.dtype for each in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


REFUSALS = {
    "missing": "/nothing.bin does not exist: pass the file with the weights",
    "neither": "checkpoint {folder}/nothing does not exist: pass a folder, or OWNER/NAME on the Hub",
    "truncated": "can't be read, it is truncated or not a checkpoint",
    "pickled": "was refused, not run: its pickle asks for",
    "another family": "has no text_decoder.cross_attn.0.ln_1_kv.weight, it is a BEiT-3 checkpoint: convert it with",
    "another key": "has keys that CoCa does not have: visual.head.weight",
    "a missing key": "has no text.cls_emb: it is incomplete",
    "a shape": "text.text_projection of shape (32, 31) does not fit",
    "no number": "contains NaN or infinity",
    "no tokenizer": "no tokenizer in {folder}: pass --tokenizer FILE",
    "another tokenizer": "has ids up to 559, the checkpoint 100 words",
    "a folder without weights": "has no weights: expected open_clip_model.safetensors or",
    "no config": "/none.json does not exist",
    "a config that is none": "is not that of an open_clip CoCa: it has no 'vision_cfg'",
    "a config of another size": "text_cfg has layers=5, the shapes say 2",
    "a config of another kind": "vision_cfg has pool_type='avg', which no published CoCa has",
    "an unknown width": "has widths 64 and 32, which no published CoCa has: pass --config",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(case, tmp_path, capsys):
    state = write_upstream(tmp_path, GOLDEN)
    file = tmp_path / "open_clip_model.safetensors"
    options, checkpoint = ["--no-tokenizer"], file
    if case == "missing":
        checkpoint = tmp_path / "nothing.bin"
    elif case == "neither":
        checkpoint = tmp_path / "nothing"
    elif case == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif case == "pickled":
        checkpoint = tmp_path / "weights.bin"
        torch.save({"state_dict": state, "run": Runs()}, checkpoint)
    elif case == "another family":
        save_file({"beit3.vision_embed.proj.weight": torch.zeros(1)}, file)
    elif case == "a folder without weights":
        checkpoint = save_clip_tokenizer(tmp_path / "empty")
    elif case in ("no tokenizer", "another tokenizer"):
        options = ["--tokenizer", save_clip_tokenizer(tmp_path / "words")] if case == "another tokenizer" else []
    elif "config" in case:
        config = config_of(GOLDEN, text_cfg__layers=5) if "size" in case else config_of(GOLDEN)
        config = config_of(GOLDEN, vision_cfg__pool_type="avg") if "kind" in case else config
        (tmp_path / "other.json").write_text(json.dumps({} if "none" in case else config))
        options += ["--config", tmp_path / ("none.json" if case == "no config" else "other.json")]
    elif case == "an unknown width":
        (tmp_path / "open_clip_config.json").unlink()
    else:
        changed = {
            "another key": state | {"visual.head.weight": torch.zeros(2)},
            "a missing key": {key: each for key, each in state.items() if key != "text.cls_emb"},
            "a shape": state | {"text.text_projection": torch.zeros(32, 31)},
            "no number": state | {"visual.proj": torch.full((32, 32), torch.nan)},
        }
        save_file(changed[case], file)
    before = sorted(os.listdir(tmp_path))
    assert run("--checkpoint", checkpoint, "--output", tmp_path / "out", *options) == 1
    captured = capsys.readouterr().err
    assert REFUSALS[case].format(folder=tmp_path) in captured and captured.count("\n") == 1, captured
    assert sorted(os.listdir(tmp_path)) == before


def test_a_repository_of_the_hub_is_converted_and_published_and_loads_elsewhere(tmp_path):
    sizes = {**GOLDEN, "vocab": 560, "texts": 16}
    write_upstream(tmp_path / "upstream", sizes, name="open_clip_pytorch_model.bin")
    save_clip_tokenizer(tmp_path / "upstream")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    with LoopbackHub({"right": "ada"}) as hub:
        hub.add("laion/coca", tmp_path / "upstream")
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "HF_TOKEN": "right"}

        def python(*arguments, package: bool = True) -> subprocess.CompletedProcess:
            own = {name: value for name, value in environment.items() if package or name != "PYTHONPATH"}
            command = [sys.executable, *map(str, arguments)]
            return subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)

        output = tmp_path / "coca"
        convert = "-m", "mome.convert", "coca", "--output", output, "--checkpoint"
        done = python(*convert, "laion/nothing")
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and not output.exists(), done.stderr
        assert "laion/nothing is neither a folder nor a repository on the Hub that you can read" in done.stderr
        done = python(*convert, "laion/coca")
        assert done.returncode == 0, done.stderr
        assert "`laion/coca`" in (output / "README.md").read_text()
        done = python("-m", "mome.publish", output, "--repo-id", "ada/coca")
        assert done.returncode == 0, done.stderr
        done = python("-c", REMOTE, "ada/coca", tmp_path / "again", tmp_path / "red.png", package=False)
        assert done.returncode == 0, done.stderr
        assert "generated_text" in done.stdout and "blue dog" in done.stdout


class Runs:
    """Something that a pickle would have to import."""


def test_what_another_converter_is_given_is_named_as_a_coca(tmp_path, capsys):
    write_upstream(tmp_path, GOLDEN)
    file = tmp_path / "open_clip_model.safetensors"
    assert main(["beit3", "--checkpoint", str(file), "--output", str(tmp_path / "out"), "--no-tokenizer"]) == 1
    assert "it is a CoCa checkpoint: convert it with `coca`" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("words, cut", [(14, False), (15, True), (16, True)])
def test_a_text_too_long_by_one_token_is_cut(words, cut, tmp_path, caplog):
    """`[EOS]`, which is the padding as well, counts."""
    tokenizer = load_clip_tokenizer(save_clip_tokenizer(tmp_path), 16, 560)
    ids = {"bos_token_id": 558, "eos_token_id": 559, "pad_token_id": 559}
    processor = build_processor(tiny_coca(vocab_size=560, **ids).config, tokenizer, None)
    for texts in (["x " * words], ["x", "x " * words]):
        caplog.clear()
        inputs = processor(text=texts, padding=True, return_tensors="pt")
        assert inputs["input_ids"].shape == (len(texts), 16) and inputs["input_ids"][-1, -1] == 559
        assert ("1 text has more than 16 tokens" in caplog.text) is cut
        if cut:
            with pytest.raises(ValueError, match="more than tokenizer.model_max_length = 16 tokens"):
                processor(text=texts, padding=True, truncation=False)


def test_texts_are_cleaned_and_exclamation_marks_survive(tmp_path):
    tokenizer = load_clip_tokenizer(save_clip_tokenizer(tmp_path), 16, 560)
    for dirty, clean in {
        "A  Red\tDOG ": "a red dog",
        "cat &amp; dog": "cat & dog",
        "cat &amp;amp; dog": "cat & dog",
        "&lt;b&gt; &quot;cat&#39;s&#x27; &eacute;&nbsp;&#8217;": "<b> \"cat's' é '",
        "“dog” ‘cat’ ﬁ ＣＡＴ": "\"dog\" 'cat' fi cat",
    }.items():
        assert tokenizer(dirty).input_ids == tokenizer(clean).input_ids
    assert tokenizer("wow!!! a!b").input_ids.count(0) == 2  # `!` inside of a word
    assert tokenizer.decode(tokenizer("wow!!! a!b").input_ids, skip_special_tokens=True) == "wow !!! a ! b "
    batch = tokenizer(["a dog", "a red dog!!"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist()[-2:] == [559, 559] and batch["attention_mask"].sum() < 12
    long = tokenizer("dog " * 40, truncation=True, max_length=tokenizer.model_max_length).input_ids
    assert len(long) == 16 and long[-1] == 559
    assert tokenizer("").input_ids == [558, 559]


# ------------------------------------------------------------------------------------------------------------ saving


def test_save_load_save_is_bit_equal(tmp_path):
    tiny_coca().save_pretrained(tmp_path / "first")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    names = sorted(os.listdir(tmp_path / "first"))
    assert names == sorted(os.listdir(tmp_path / "second")) and "modeling_coca.py" in names
    assert filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", names, shallow=False) == (names, [], [])


def test_one_checkpoint_serves_every_auto_class(tmp_path):
    captioner = tiny_coca()
    captioner.save_pretrained(tmp_path)
    batch = coca_batch(captioner.config)
    expected = captioner.model(**batch).logits_per_image
    for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
        model = auto_class.from_pretrained(tmp_path)
        assert type(model) is mome.CocaModel
        assert torch.equal(model(**batch).logits_per_image, expected)


REMOTE = """
import sys, torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
folder, again, image = sys.argv[1:]
assert "mome" not in sys.modules
options = {"trust_remote_code": True}
captioner = AutoModelForImageTextToText.from_pretrained(folder, **options)
processor = AutoProcessor.from_pretrained(folder, **options)
assert type(AutoModel.from_pretrained(folder, **options)).__name__ == "CocaModel"
captioner.save_pretrained(again)
processor.save_pretrained(again)
options["model"] = folder
labels = ["red", "blue dog"]
print(pipeline("zero-shot-image-classification", **options)(image, candidate_labels=labels))
print(pipeline("open-vocabulary-image-classification", **options)(image, candidate_labels=labels))
print(len(pipeline("image-feature-extraction", **options)(image)[0]))
print(len(pipeline("feature-extraction", **options)("red")[0]))
print(pipeline("image-text-to-text", **options)(image, text="", max_new_tokens=4))
print(pipeline("image-captioning", **options)(image, guidance="rerank", num_captions=2))
print("tokens", captioner.generate(**processor(images=[image], return_tensors="pt"), max_new_tokens=4).tolist())
assert "mome" not in sys.modules
"""


def test_a_folder_with_only_its_files_works_without_the_package(checkpoint, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    image = checkpoint.parent / "red.png"
    command = [sys.executable, "-c", REMOTE, checkpoint, tmp_path / "again", image]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    processor, captioner = AutoProcessor.from_pretrained(checkpoint), mome.CocaForConditionalGeneration
    ids = captioner.from_pretrained(checkpoint).generate(
        **processor(images=[str(image)], return_tensors="pt"), max_new_tokens=4
    )
    assert f"tokens {ids.tolist()}" in done.stdout
    code = {path.name for path in checkpoint.glob("*.py")}
    assert code == {path.name for path in (tmp_path / "again").glob("*.py")}
    assert {"modeling_coca.py", "towers_coca.py", "pipeline_mome.py", "processing_mome.py"} <= code
    assert "trunk_mome.py" not in code


# --------------------------------------------------------------------------------------------------------------- use


def test_the_processor_resizes_the_shorter_side_and_crops_the_centre(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint)
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (16, 0, 48, 32))
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    expected = [(1 - mean) / std for mean, std in zip((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))]
    assert_close(pixels[0].mean(dim=(1, 2)), torch.tensor(expected), atol=1e-3, rtol=0)
    assert processor.image_processor.resample == Image.Resampling.BICUBIC


@torch.no_grad()
def test_pipelines_embedder_and_command_agree(checkpoint, capsys):
    images = [str(checkpoint.parent / f"{name}.png") for name in ("red", "blue")]
    captioner = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    ids = captioner.generate(pixel_values=pixels, max_new_tokens=5)
    texts = processor.post_process_image_text_to_text(ids)
    image_embeds = captioner.get_image_features(pixels).pooler_output

    embedder = Embedder.load(checkpoint, captions=True)
    assert embedder.caption_images(images, max_new_tokens=5) == texts
    assert_close(embedder.embed_images(images), image_embeds, **CLOSE)
    labels = ["a red dog", "blue cat!!", "square"]
    alone = torch.cat([embedder.embed_texts([label]) for label in labels])
    assert_close(embedder.embed_texts(labels), alone, **CLOSE)
    assert embedder.longest_text == 16

    captions = stock_pipeline("image-captioning", model=str(checkpoint))(images, max_new_tokens=5, batch_size=2)
    assert [each[0]["generated_text"] for each in captions] == texts
    probabilities = (image_embeds @ alone.T * captioner.logit_scale.exp()).softmax(dim=1)
    classify = stock_pipeline("open-vocabulary-image-classification", model=str(checkpoint))
    stock = stock_pipeline("zero-shot-image-classification", model=str(checkpoint))
    for row, image in enumerate(images):
        expected = dict(zip(labels, probabilities[row].tolist()))
        for answers in (
            classify(image, candidate_labels=labels),
            stock(image, candidate_labels=labels, hypothesis_template="{}"),
        ):
            assert {each["label"]: pytest.approx(each["score"], abs=1e-4) for each in answers} == expected

    for command in (["caption", *images, "--max-new-tokens", "5"], ["classify", *images, "--labels", "red,dog"]):
        cli.app([*command, "--model", str(checkpoint)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert all(f"{image}: {text}  (" in printed for image, text in zip(images, texts))


def test_a_folder_is_embedded_and_searched(checkpoint, tmp_path, capsys):
    table = tmp_path / "table.parquet"
    for command in (["embed", str(checkpoint.parent), "--output", str(table)], ["search", str(table), "red dog"]):
        options = ["--model", str(checkpoint)] if command[0] == "embed" else []
        cli.app([*command, *options], standalone_mode=False)
    assert "red.png" in capsys.readouterr().out


def test_a_published_folder_has_its_code_and_card(checkpoint, tmp_path):
    folder = build_folder(checkpoint, tmp_path / "folder", "someone/coca")
    assert {path.name for path in checkpoint.glob("*.py")} == {path.name for path in folder.glob("*.py")}
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-text-to-text"
    assert 'pipeline("image-captioning"' in card.text and 'path = "someone/coca"' in card.text
    assert "caption decoder, layers × width × heads | 2 × 32 × 4" in card.text
    weights = load_file(checkpoint / "model.safetensors")
    again = load_file(folder / "model.safetensors")
    assert weights.keys() == again.keys() and all(torch.equal(each, again[key]) for key, each in weights.items())


def test_lora_on_all_linear_layers_merged_equals_unmerged():
    import peft

    captioner = tiny_coca()
    batch = coca_batch(captioner.config)
    before = captioner(**batch).logits
    adapted = peft.get_peft_model(
        captioner, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    touched = {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert {name.rpartition(".")[2] for name in touched} >= {"query_key_value", "key_value", "query", "up_proj"}
    adapted.eval()
    unmerged = adapted(**batch).logits
    assert (unmerged - before).abs().max() > 0.01
    assert_close(adapted.merge_and_unload()(**batch).logits, unmerged, atol=1e-4, rtol=0)
