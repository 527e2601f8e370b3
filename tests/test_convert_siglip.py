"""SigLIP as MoME: embeddings, logits and scores of transformers' `SiglipModel`, whichever way they are asked for."""

import json
import os
import random
import string
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, SiglipTokenizer, pipeline
from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer
from typer.testing import CliRunner

import mome
from mome.cli import app
from mome.convert import driver
from mome.convert.__main__ import main
from mome.convert.hub import CheckpointFiles
from mome.convert.siglip_text import load_siglip_tokenizer
from siglip_models import IMAGES, SHAPES, WORDS, gemma_tokenizer, save_siglip, write_tokenizer

LABELS = ["a red circle", "the dog, and cat!", "cat", "three blue triangles on white"]


def convert(folder, output, *options: str) -> str:
    assert main(["siglip", "--checkpoint", str(folder), "--output", str(output), *options]) == 0
    return str(output)


@pytest.fixture(scope="module", params=[(shape, 1) for shape in SHAPES] + [("base-like", 2)], ids=str)
def pair(request, tmp_path_factory):
    """The upstream model, its folder and the converted folder."""
    folder = tmp_path_factory.mktemp("siglip")
    shape, version = request.param
    return (
        save_siglip(folder / "upstream", shape, version),
        folder / "upstream",
        convert(folder / "upstream", folder / "mome"),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return (
        save_siglip(folder / "upstream"),
        folder / "upstream",
        convert(folder / "upstream", folder / "mome", "--caption"),
    )


def pictures(count: int = 3, side: int = 40) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side + 9, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in noise]


@torch.no_grad()
def expected(upstream, path: str, images: list[Image.Image], texts: list[str]):
    """What transformers' model gives for texts that are padded to 64 tokens, without a mask."""
    processor = AutoProcessor.from_pretrained(path)
    options = {"padding": "max_length", "max_length": 64, "truncation": True, "return_tensors": "pt"}
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values
    return upstream(input_ids=processor.tokenizer(texts, **options).input_ids, pixel_values=pixels)


# ------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_and_logits_are_those_of_siglip(pair):
    upstream, _, path = pair
    processor, model = AutoProcessor.from_pretrained(path), AutoModel.from_pretrained(path)
    theirs = expected(upstream, path, pictures(), LABELS)
    with torch.no_grad():
        ours = model(**processor(text=LABELS, images=pictures(), return_tensors="pt"))
    for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
    assert theirs.logits_per_image.std() > 0.03  # not all the same
    states = model.get_image_features(processor(images=pictures(), return_tensors="pt").pixel_values).last_hidden_state
    assert (
        states.shape[1] == (upstream.config.vision_config.image_size // upstream.config.vision_config.patch_size) ** 2
    )


def test_pixels_are_those_of_siglips_own_processor(pair):
    _, folder, path = pair
    theirs = AutoProcessor.from_pretrained(path).image_processor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    own = SiglipImageProcessorPil(**json.loads((folder / "preprocessor_config.json").read_text()))
    ours, wanted = (each(pictures(), return_tensors="pt").pixel_values for each in (theirs, own))
    assert_close(ours, wanted, atol=1e-6, rtol=0)
    assert theirs.resample == own.resample and theirs.resample in (2, 3)


@torch.no_grad()
def test_padding_mask_and_batch_change_nothing(pair):
    upstream, _, path = pair
    tokenizer, model = AutoProcessor.from_pretrained(path).tokenizer, AutoModel.from_pretrained(path)
    wanted = expected(upstream, path, pictures(1), LABELS).text_embeds
    full = tokenizer(LABELS, padding="max_length", max_length=64, return_tensors="pt")
    left = tokenizer(LABELS, padding=True, padding_side="left", return_tensors="pt")
    short = tokenizer(LABELS, padding=True, return_tensors="pt")
    wide = {"input_ids": torch.nn.functional.pad(full["input_ids"], (0, 9), value=tokenizer.pad_token_id)}
    single = [tokenizer([text], return_tensors="pt") for text in LABELS]
    start = torch.full((len(LABELS), 1), model.config.bos_token_id)
    started = {"input_ids": torch.cat([start, short["input_ids"]], dim=1)}
    for inputs in (full, left, short, wide, started):
        assert_close(model.get_text_features(**inputs).pooler_output, wanted, atol=1e-5, rtol=0)
        embeds = model.get_text_features(input_ids=inputs["input_ids"]).pooler_output
        assert_close(embeds, wanted, atol=1e-5, rtol=0)
    embeds = torch.cat([model.get_text_features(**each).pooler_output for each in single])
    assert_close(embeds, wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="65 tokens, max_position_embeddings is 64"):
        model.get_text_features(torch.full((1, 65), 9))


def test_gradients_and_the_loss_are_those_of_siglip(small):
    upstream, _, path = small
    model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
    inputs = processor(text=LABELS[:3], images=pictures(), return_tensors="pt")
    full = processor.tokenizer(LABELS[:3], padding="max_length", max_length=64, return_tensors="pt").input_ids
    theirs = upstream(input_ids=full, pixel_values=inputs["pixel_values"], return_loss=True).loss
    ours = model(**inputs, return_loss=True).loss
    assert_close(ours, theirs.reshape(()), atol=1e-4, rtol=1e-5)
    upstream.zero_grad()
    theirs.backward()
    ours.backward()
    assert_close(model.image_pooling.probe.grad, upstream.vision_model.head.probe.grad, atol=1e-4, rtol=1e-3)
    assert_close(model.logit_bias.grad, upstream.logit_bias.grad.reshape(()), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------- pipelines and commands


@pytest.mark.parametrize("task", ["zero-shot-image-classification", "open-vocabulary-image-classification"])
def test_scores_of_pipelines_are_sigmoids(task, pair):
    upstream, _, path = pair
    options = {"hypothesis_template": "{}"} if task.startswith("zero") else {"top_k": 9}
    answers = pipeline(task, model=path)(pictures(), candidate_labels=LABELS, **options)
    wanted = expected(upstream, path, pictures(), LABELS).logits_per_image.sigmoid()
    for answer, row in zip(answers, wanted):
        scores = {each["label"]: each["score"] for each in answer}
        assert_close(torch.tensor([scores[label] for label in LABELS]), row, atol=1e-5, rtol=0)
        assert [each["score"] for each in answer] == sorted(scores.values(), reverse=True)


def test_the_type_in_files_stays_mome(pair, tmp_path):
    path = pair[2]
    config = AutoConfig.from_pretrained(path)
    config.save_pretrained(tmp_path)
    for folder in (path, tmp_path):
        assert (
            json.loads(AutoConfig.from_pretrained(folder) and open(f"{folder}/config.json").read())["model_type"]
            == "mome"
        )
    assert config.model_type == "mome_siglip" and mome.MomeConfig().model_type == "mome"


def test_sentence_transformers_gives_the_same(small):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    upstream, _, path = small
    encoder = sentence_transformers.SentenceTransformer(path, trust_remote_code=True, device="cpu")
    theirs = expected(upstream, path, pictures(), LABELS)
    assert_close(torch.tensor(encoder.encode(LABELS)), theirs.text_embeds, atol=1e-5, rtol=0)
    assert_close(torch.tensor(encoder.encode(pictures())), theirs.image_embeds, atol=1e-5, rtol=0)


def test_embed_search_and_classify_take_it(small, tmp_path):
    upstream, _, path = small
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pictures()):
        picture.save(tmp_path / "pictures" / f"{number}.png")
    run, table = CliRunner(), str(tmp_path / "table.parquet")
    done = run.invoke(app, ["embed", str(tmp_path / "pictures"), "--output", table, "--model", path])
    assert done.exit_code == 0, done.output
    theirs = expected(upstream, path, pictures(), LABELS)
    cosines = theirs.text_embeds @ theirs.image_embeds.T
    done = run.invoke(app, ["search", table, LABELS[1], "--model", path, "--json"])
    hits = {hit["id"].split("/")[-1]: hit["score"] for hit in json.loads(done.output)}
    assert_close(torch.tensor([hits[f"{i}.png"] for i in range(3)]), cosines[1], atol=1e-5, rtol=0)
    command = [
        "classify",
        str(tmp_path / "pictures" / "2.png"),
        "--labels",
        "a red circle,cat",
        "--model",
        path,
        "--json",
    ]
    scores = {each["label"]: each["score"] for each in json.loads(run.invoke(app, command).stdout)["results"]}
    wanted = theirs.logits_per_image.sigmoid()[2]
    assert_close(torch.tensor([scores["a red circle"], scores["cat"]]), wanted[[0, 2]], atol=1e-5, rtol=0)


def test_the_folder_says_what_it_is(pair):
    card = open(f"{pair[2]}/README.md").read()
    assert "\nlicense: apache-2.0\n" in card and "2303.15343" in card and "@inproceedings{siglip" in card
    assert "Google" in card and "Microsoft" not in card
    config = AutoConfig.from_pretrained(pair[2])
    assert config.num_image_tokens == config.grid_size**2 and config.image_token_id < config.vocab_size


def test_another_resolution_resizes_the_positions(small, tmp_path):
    upstream, folder, _ = small
    model = AutoModel.from_pretrained(convert(folder, tmp_path / "larger", "--image-size", "64"))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs = upstream.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        ours = model.get_image_features(pixels).pooler_output
    assert_close(ours, torch.nn.functional.normalize(theirs, dim=-1), atol=1e-5, rtol=0)


def test_half_precision_stays_half(tmp_path):
    save_siglip(tmp_path / "in").bfloat16().save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    assert {each.dtype for each in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_checkpoint_in_parts_and_old_files_with_buffers_convert(tmp_path):
    upstream = save_siglip(tmp_path / "in")
    state = load_file(tmp_path / "in" / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(64)[None]
    os.remove(tmp_path / "in" / "model.safetensors")
    keys, index = sorted(state), {}
    for number, part in enumerate((keys[::2], keys[1::2])):
        save_file({key: state[key] for key in part}, tmp_path / "in" / f"part{number}.safetensors")
        index |= dict.fromkeys(part, f"part{number}.safetensors")
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    path = convert(tmp_path / "in", tmp_path / "out")
    theirs = expected(upstream, path, pictures(1), LABELS)
    model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
    with torch.no_grad():
        ours = model(**processor(text=LABELS, images=pictures(1), return_tensors="pt"))
    assert_close(ours.logits_per_image, theirs.logits_per_image, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------- tokenizers


def strange_texts(count: int) -> list[str]:
    draw, words = random.Random(1), WORDS.split()
    letters = [
        chr(code) for code in [*range(0x20, 0x250), *range(0x391, 0x3CA), 0x3000, 0x2581, 0x301, 0xFB01, 0xFF21]
    ]
    letters = [letter for letter in letters if unicodedata.category(letter) != "Cn"]
    texts = [
        "",
        " ",
        "...",
        "!dog",
        "! dog",
        " dog",
        "dog ",
        "ΟΔΟΣ",
        "İstanbul",
        "cafe\u0301",
        "ﬁve ½",
        "a\u200cb\tc\n",
    ]
    while len(texts) < count:
        text = " ".join(draw.choices(words, k=draw.randint(0, 9)))
        for _ in range(draw.choice((0, 0, 1, 4))):
            place = draw.randint(0, len(text))
            text = text[:place] + draw.choice([*string.punctuation, *"  \t\n", *letters]) + text[place:]
        texts.append(text.upper() if draw.random() < 0.1 else text)
    return texts


def test_version_1_tokenizes_as_transformers_does(tmp_path):
    write_tokenizer(tmp_path)
    theirs, ours = (
        SiglipTokenizer(str(tmp_path / "spiece.model")),
        load_siglip_tokenizer(CheckpointFiles(tmp_path), 64),
    )
    texts = strange_texts(1000)
    assert len(set(texts)) > 900
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids, repr(text)
    padded = ours(texts[:50], padding="max_length", truncation=True, max_length=8).input_ids
    assert padded == theirs(texts[:50], padding="max_length", truncation=True, max_length=8).input_ids
    assert (ours.pad_token_id, ours.eos_token_id) == (1, 1) and ours.padding_side == "right"
    assert ours.decode(ours("a red circle").input_ids, skip_special_tokens=True) == "a red circle"


def test_version_1_is_the_same_from_a_fast_file(tmp_path):
    write_tokenizer(tmp_path)
    ours = load_siglip_tokenizer(CheckpointFiles(tmp_path), 64)
    (tmp_path / "fast").mkdir()
    ours.save_pretrained(tmp_path / "fast")
    again = load_siglip_tokenizer(CheckpointFiles(tmp_path / "fast"), 64)
    for text in strange_texts(100):
        assert again(text).input_ids == ours(text).input_ids, repr(text)
    assert again.bos_token_id == ours.bos_token_id


def test_version_2_is_gemmas_tokenizer_in_lower_case(tmp_path):
    write_tokenizer(tmp_path, version=2)
    ours = load_siglip_tokenizer(CheckpointFiles(tmp_path), 64)
    state = json.loads(gemma_tokenizer())["model"]
    theirs = Siglip2Tokenizer(state["vocab"], [tuple(pair) for pair in state["merges"]])
    for text in strange_texts(300):
        assert ours(text).input_ids == [*theirs(text, add_special_tokens=False).input_ids, 1], repr(text)
    assert ours("A RED, Dog.").input_ids == ours("a red, dog.").input_ids
    assert (ours.pad_token_id, ours.eos_token_id, ours.bos_token_id) == (0, 1, 2)


def test_punctuation_is_left_out_only_if_wanted(tmp_path):
    write_tokenizer(tmp_path, version=2)
    keeping, stripping = (load_siglip_tokenizer(CheckpointFiles(tmp_path), 64, strip) for strip in (False, True))
    assert keeping("a dog.").input_ids != keeping("a dog").input_ids
    assert stripping("A dog, red. ").input_ids == keeping("a dog red").input_ids


def test_sentencepiece_is_not_needed_afterwards(small):
    code = "import sys; sys.modules['sentencepiece'] = None; from transformers import AutoTokenizer; "
    code += "import mome; print(AutoTokenizer.from_pretrained(sys.argv[1])('A red dog!').input_ids)"
    done = subprocess.run([sys.executable, "-c", code, small[2]], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)[-1] == 1, done.stderr


# ------------------------------------------------------------------------------------------------------- memory


MEASURE = """
import resource, sys
from mome.convert.__main__ import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_stays_near_the_size_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setitem(
        SHAPES,
        "wide",
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8},
    )
    monkeypatch.setitem(IMAGES, "wide", {"image_size": 224, "patch_size": 16})
    save_siglip(tmp_path / "in", "wide")
    size = (tmp_path / "in" / "model.safetensors").stat().st_size
    assert size > driver.LARGE
    arguments = ["siglip", "--checkpoint", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak = (1024 * int(number) for number in done.stdout.splitlines()[-1].split())
    assert peak - before < 2.2 * size
    assert "converting" in done.stderr and "100%" in done.stderr


def test_captions_start_from_copies_of_the_texts_experts(small):
    captioner = AutoModelForImageTextToText.from_pretrained(small[2])
    state = captioner.state_dict()
    copies = [name for name in state if ".caption." in name]
    assert len(copies) == 2 * 12 + 2
    for name in copies:
        assert torch.equal(state[name], state[name.replace(".caption.", ".text.")]), name
    words = state["model.text_embedding.word_embeddings.weight"]
    assert torch.equal(state["lm_head.decoder.weight"], words) and captioner.config.tie_word_embeddings
    assert_close(words[-1], words[:-2].mean(dim=0))


def test_a_prompt_begins_with_bos_in_whatever_form_it_is_asked_for(small):
    processor = AutoProcessor.from_pretrained(small[2])
    bos, words = processor.tokenizer.bos_token_id, processor.tokenizer("a red", add_special_tokens=False).input_ids
    images = pictures(2)
    empty = processor(images=images, text="", return_tensors="pt")
    assert empty["input_ids"].tolist() == [[bos], [bos]] and empty["attention_mask"].tolist() == [[1], [1]]
    for kind in (None, "np", "pt"):
        inputs = processor(images=images, text=["a red", ""], caption_prompt=True, return_tensors=kind)
        ids, mask = ([list(map(int, row)) for row in inputs[key]] for key in ("input_ids", "attention_mask"))
        padding = [processor.tokenizer.pad_token_id] * len(words)
        assert ids == [[bos, *words], [*padding, bos]] and mask == [[1] * (len(words) + 1), [0] * len(words) + [1]]
    assert processor(text="a red", return_tensors="pt")["input_ids"][0].tolist() == [*words, 1]  # of texts, none does
    captioner = AutoModelForImageTextToText.from_pretrained(small[2])
    inputs = processor(images=images, text=["a red", ""], caption_prompt=True, return_tensors="pt")
    both = captioner.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    for row, prompt in enumerate(["a red", ""]):
        alone = processor(images=images[row], text=prompt, caption_prompt=True, return_tensors="pt")
        width = alone["input_ids"].shape[1] + 4
        assert torch.equal(captioner.generate(**alone, max_new_tokens=4, min_new_tokens=4)[0], both[row, -width:])
    plain = processor(text=["a red"], images=images[:1], return_tensors="pt")  # with [EOS], without [BOS]
    assert torch.equal(captioner.generate(**plain, max_new_tokens=4, min_new_tokens=4)[0], both[0])


def test_the_space_scores_labels_alone(small, monkeypatch):
    from mome_space.engine import Engine
    from mome_space.loading import load_checkpoint

    monkeypatch.setenv("MOME_CHECKPOINT", small[2])
    found = Engine(*load_checkpoint()).classify(pictures(1)[0], LABELS, ["{}"])
    wanted = expected(small[0], small[2], pictures(1), LABELS).logits_per_image.sigmoid()[0]
    assert_close(torch.from_numpy(found).float(), wanted, atol=1e-5, rtol=0)
