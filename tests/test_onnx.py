"""An export stands in for its checkpoint: the same embeddings, captions and hits; and what can't be is one line."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from builders import build_processor
from models import tiny_captioner, tiny_coca
from mome import cli
from mome.embedder import Embedder
from mome.errors import ExportError, MomeError
from mome.experiments import exports
from mome.export import __main__ as command
from mome.onnx_embedder import OnnxEmbedder, load_embedder, open_session
from mome.publish import build_folder
from mome.retrieval import Searcher, embed_corpus

if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
    pytest.skip("onnx, onnxscript and onnxruntime are not installed", allow_module_level=True)

import onnx

from mome.export.check import draw_picture
from mome.export.folder import export_checkpoint
from mome.export.graphs import graph_of, quantised
from mome.export.modules import TextTower

PARTS = ("vision_model", "text_model", "model", "decoder_model_merged")
SUFFIXES = {"fp32": "", "q8": "_quantized"}
WIDE = {"hidden_size": 64, "initializer_range": 0.1}  # routers that 8 bits seldom change
COLOURS, SHAPES = (
    ("red", "green", "blue", "black", "white"),
    ("circle", "square", "triangle", "dot", "line", "cat", "dog"),
)
MANY = [f"{article} {colour} {shape}" for article in ("a", "the") for colour in COLOURS for shape in SHAPES]
TEXTS = ["a red circle", "the cat on a photo", "dog", "a blue square and a green line and the black triangle of a dot"]


def saved(folder: Path, variant: str = "routed", seed: int = 2, model=None) -> Path:
    processor = build_processor(16)
    if model is None:  # wide enough: narrower matrices stay in float32
        captioner = tiny_captioner(variant, seed, vocab_size=len(processor.tokenizer), **WIDE)
    else:
        captioner = model
    captioner.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, by the first of pytest-xdist's workers that wants it: an export takes a minute."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name  # the parent is this run's alone
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    """A routed captioner."""
    return made_once(
        tmp_path_factory, "tiny-onnx", lambda folder: export_checkpoint(checkpoint, folder, tuple(SUFFIXES))
    )


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    import numpy as np

    random = np.random.default_rng(5)
    return [draw_picture(random, 40) for _ in range(36)]


# --------------------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize(("dtype", "least"), [("fp32", 0.99999), ("q8", 0.999)])
def test_an_export_embeds_as_its_checkpoint(checkpoint, exported, pictures, dtype, least):
    torch_embedder, onnx_embedder = Embedder.load(checkpoint, "cpu"), OnnxEmbedder.load(exported, dtype)
    for batch_size in (1, 3, 32):
        images = onnx_embedder.embed_images(pictures, batch_size), torch_embedder.embed_images(pictures, batch_size)
        said = [*TEXTS, *MANY]  # many: one whose expert is another must not decide
        texts = onnx_embedder.embed_texts(said, batch_size), torch_embedder.embed_texts(said, batch_size)
        for actual, expected in (images, texts):
            assert actual.shape == expected.shape and actual.dtype == torch.float32
            assert F.cosine_similarity(actual, expected).mean() >= least
            assert torch.allclose(actual.norm(dim=1), torch.ones(len(actual)), atol=1e-5)
    assert onnx_embedder.longest_text == torch_embedder.longest_text
    with pytest.raises(MomeError, match="text 0 is ' '"):
        onnx_embedder.embed_texts([" "])


def test_an_export_captions_as_its_checkpoint(checkpoint, exported, pictures):
    expected = Embedder.load(checkpoint, "cpu", captions=True)
    actual = OnnxEmbedder.load(exported, "fp32", captions=True)
    for length in (1, 7, 50):
        captions = actual.caption_images(pictures[:7], batch_size=3, max_new_tokens=length)
        assert captions == expected.caption_images(pictures[:7], max_new_tokens=length)
    assert len(set(captions)) > 1
    with pytest.raises(MomeError, match="'num_beams': an export writes greedy captions"):
        actual.caption_images(pictures[:1], num_beams=4)
    with pytest.raises(MomeError, match="load it with captions=True"):
        OnnxEmbedder.load(exported).caption_images(pictures[:1])


def test_an_experiment_compares_an_export_with_its_checkpoint(checkpoint, exported, pictures, monkeypatch, capsys):
    monkeypatch.setattr(exports, "read_gallery", lambda: (MANY[: len(pictures)], pictures))
    given = ["--checkpoint", str(checkpoint), "--export", str(exported), "--number", "30", "--captions", "20"]
    figures = exports.main(given)
    assert figures["fp32, lowest cosine of images"] > 0.99999 < figures["fp32, lowest cosine of texts"]
    assert figures["fp32, same captions"] == 1
    expected, actual = Embedder.load(checkpoint, "cpu"), OnnxEmbedder.load(exported, "q8")
    cosines = F.cosine_similarity(expected.embed_images(pictures[:30], 32), actual.embed_images(pictures[:30], 32))
    assert figures["q8, cosine of images"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert figures["q8, lowest cosine of images"] == pytest.approx(cosines.min().item(), abs=1e-6)
    assert "q8, same captions" in capsys.readouterr().out
    other = saved(checkpoint.parent / "other", seed=3)
    with pytest.raises(SystemExit, match="was made of other weights"):
        exports.main([*given, "--checkpoint", str(other)])
    with pytest.raises(SystemExit, match="holds no export"):
        exports.main([*given, "--export", str(checkpoint)])


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_a_caption_of_no_token_is_refused(exported, pictures, count):
    with pytest.raises(MomeError, match=rf"^max_new_tokens={count} must be a whole number from 1$"):
        load_embedder(exported, captions=True).caption_images(pictures[:1], max_new_tokens=count)


def test_captions_end_where_the_checkpoints_do(checkpoint, exported, pictures, tmp_path):
    """At any of several end tokens: the one that the model writes most is one of them."""
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    captioner = Embedder.load(checkpoint, "cpu", captions=True)
    ids = OnnxEmbedder.load(copy, captions=True).caption_ids(torch.cat(list(captioner.pixel_batches(pictures[:7]))))
    end = [2, int(ids[:, 2:].flatten().mode().values)]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    captioner.model.generation_config.eos_token_id = end
    shorter = OnnxEmbedder.load(copy, captions=True).caption_images(pictures[:7])
    assert shorter == captioner.caption_images(pictures[:7])
    assert shorter != OnnxEmbedder.load(exported, captions=True).caption_images(pictures[:7])


def test_the_folder_is_complete_and_its_weights_are_small(exported):
    names = {path.name for path in (exported / "onnx").iterdir()}
    assert names == {f"{part}{suffix}.onnx" for part in PARTS for suffix in SUFFIXES.values()}
    images = json.loads((exported / "preprocessor_config.json").read_text())
    assert (
        images["size"] == {"height": 16, "width": 16} and images["image_processor_type"] and "auto_map" not in images
    )
    for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).is_file()
    for part in PARTS:
        quantised = onnx.load(exported / "onnx" / f"{part}_quantized.onnx")
        large = [each for each in quantised.graph.initializer if len(each.dims) == 2 and min(each.dims) > 32]
        assert large and all(each.data_type == onnx.TensorProto.INT8 for each in large), part
        routers = [each for each in quantised.graph.initializer if "router.weight" in each.name]
        assert routers and all(each.data_type == onnx.TensorProto.FLOAT for each in routers), part
        assert "MatMulInteger" in {node.op_type for node in quantised.graph.node}
        assert {entry.domain: entry.version for entry in quantised.opset_import}[""] == 20


@torch.no_grad()
def test_words_have_a_scale_for_each_row_and_positions_stay_as_they_are(tmp_path):
    tower = TextTower(tiny_captioner("dense", vocab_size=400, hidden_size=64).model)
    words = tower.model.text_embedding.word_embeddings.weight
    words[7] *= 40  # on one scale for all, it would leave the others few steps
    graph = graph_of(tower)
    quantised(graph, tmp_path / "text.onnx")
    kinds = {tuple(each.dims): each.data_type for each in onnx.load(tmp_path / "text.onnx").graph.initializer}
    assert kinds[400, 64] == onnx.TensorProto.INT8 and kinds[24, 64] == kinds[400, 1] == onnx.TensorProto.FLOAT
    ids = torch.arange(8, 400).view(-1, 7)
    given = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    (embeds,) = open_session(tmp_path / "text.onnx").run(None, given)
    expected = tower(ids, torch.ones_like(ids))
    assert F.cosine_similarity(torch.from_numpy(embeds), expected).mean() > 0.999


def test_a_model_without_captions_has_three_files_in_half_precision_too(tmp_path, pictures):
    model = tiny_captioner("dense", vocab_size=len(build_processor(16).tokenizer)).model
    folder = saved(tmp_path / "embedder", model=model)
    done = export_checkpoint(folder, tmp_path / "out", ["fp16"])
    assert set(done.sizes) == {f"{part}_fp16.onnx" for part in PARTS[:3]} and done.agreement["fp16"].captions is None
    actual, expected = OnnxEmbedder.load(done.output), Embedder.load(folder, "cpu")
    assert actual.precision == "float16"
    torch.testing.assert_close(
        actual.embed_images(pictures[:3]), expected.embed_images(pictures[:3]), atol=5e-3, rtol=0
    )
    for path in (done.output / "onnx").iterdir():
        graph = onnx.load(path).graph
        ends = {each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)}
        assert ends <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
        assert {each.data_type for each in graph.initializer if len(each.dims) == 2} == {onnx.TensorProto.FLOAT16}


@pytest.fixture(scope="module")
def coca(tmp_path_factory) -> tuple[Path, Path]:
    """A CoCa that writes the filler now and then, and its export."""

    def make(folder: Path):
        size = {"vocab_size": len(build_processor(16).tokenizer), "hidden_size": 64, "decoder_intermediate_size": 96}
        model = tiny_coca(4, **size, max_position_embeddings=16, pad_token_id=0)
        with torch.no_grad():
            model.lm_head.weight[0] = model.lm_head.weight[18] * 1.1
        done = export_checkpoint(saved(folder / "coca", model=model), folder / "onnx", ["fp32", "q8", "fp16"])
        suffixes = ("", "_quantized", "_fp16")
        assert set(done.sizes) == {f"{part}{suffix}.onnx" for part in PARTS for suffix in suffixes}
        assert done.agreement["fp32"].captions == 1 and done.agreement["fp16"].captions >= 0.75

    folder = made_once(tmp_path_factory, "coca", make)
    return folder / "coca", folder / "onnx"


def test_a_coca_embeds_as_its_checkpoint(coca, pictures):
    folder, export = coca
    expected = Embedder.load(folder, "cpu")
    for dtype, least in (("fp32", 0.99999), ("q8", 0.999), ("fp16", 0.9999)):
        actual = OnnxEmbedder.load(export, dtype)
        for batch_size in (1, 3, 32):
            images = actual.embed_images(pictures, batch_size), expected.embed_images(pictures, batch_size)
            texts = actual.embed_texts(MANY, batch_size), expected.embed_texts(MANY, batch_size)
            assert all(F.cosine_similarity(*both).mean() >= least for both in (images, texts))
    assert actual.logit_scale == expected.model.logit_scale.item() and actual.logit_bias is None


def test_a_coca_captions_as_its_checkpoint(coca, pictures):
    folder, export = coca
    expected, actual = Embedder.load(folder, "cpu", captions=True), OnnxEmbedder.load(export, captions=True)
    for batch_size, length in ((1, 7), (3, 50), (32, 50)):
        captions = actual.caption_images(pictures, batch_size, max_new_tokens=length)
        assert captions == expected.caption_images(pictures, batch_size, max_new_tokens=length)
    pixel_values = torch.cat(list(expected.pixel_batches(pictures)))
    ids = expected.model.generate(pixel_values=pixel_values, max_new_tokens=15, do_sample=False)
    assert torch.equal(actual.caption_ids(pixel_values, 50), ids) and len(set(captions)) > 15
    ended = (ids == 2).cumsum(dim=1) > 0
    assert ((ids == 0) & ~ended).any() and ended[:, -2].any()  # the filler among words; captions of several lengths
    for dtype, least in (("q8", 18), ("fp16", 27)):
        others = OnnxEmbedder.load(export, dtype, captions=True).caption_images(pictures, max_new_tokens=50)
        assert sum(other == caption for other, caption in zip(others, captions)) >= least


def test_a_coca_is_published_with_its_export(coca, pictures, tmp_path):
    folder, export = coca
    published = build_folder(folder, tmp_path / "published", "me/mine", onnx=export)
    assert len(list((published / "onnx").glob("*.onnx"))) == 12
    both = [load_embedder(published, backend, "cpu", captions=True) for backend in ("torch", "onnx-fp32")]
    assert both[0].fingerprint == both[1].fingerprint
    assert both[0].caption_images(pictures[:5]) == both[1].caption_images(pictures[:5])


def test_a_siglip_is_exported_with_its_padding_and_its_bias(tmp_path, pictures):
    """Whatever padding a text comes with, the graph fills it up to the length that the model was trained with."""
    size = {"vocab_size": len(build_processor(16).tokenizer), "hidden_size": 64, "projection_dim": 64}
    captioner = tiny_captioner("siglip", 4, **size, max_position_embeddings=16)
    torch.nn.init.constant_(captioner.model.logit_bias, -3.0)
    folder = saved(tmp_path / "siglip", model=captioner)
    done = export_checkpoint(folder, tmp_path / "out", ["fp32"])
    assert set(done.sizes) == {f"{part}.onnx" for part in PARTS} and done.agreement["fp32"].captions == 1
    embedding = saved(tmp_path / "embedding", model=captioner.model)
    assert export_checkpoint(embedding, tmp_path / "out-q8", ["q8"]).agreement["q8"].texts[0] > 0.999
    expected = Embedder.load(folder, "cpu", captions=True)
    actual = OnnxEmbedder.load(done.output, "fp32", captions=True)
    torch.testing.assert_close(actual.embed_images(pictures), expected.embed_images(pictures), atol=1e-5, rtol=0)
    texts = torch.tensor([[6, 9, 12, 2], [7, 2, 0, 0], [0, 0, 8, 2]])
    batches = [{"input_ids": texts, "attention_mask": (texts != 0).long()}]
    batches += [{name: F.pad(each, (padding, 0)) for name, each in batches[0].items()} for padding in (1, 12, 30)]
    embeds = expected.embed_tokens(batches[0])
    for batch in batches:
        torch.testing.assert_close(actual.embed_tokens(batch), embeds, atol=1e-5, rtol=0)
    pixel_values = torch.cat(list(expected.pixel_batches(pictures[:5])))
    session = open_session(done.output / "onnx" / "model.onnx")
    given = {name: each.numpy() for name, each in {**batches[2], "pixel_values": pixel_values}.items()}
    (logits,) = session.run(["logits_per_image"], given)
    wanted = expected.model.model(pixel_values=pixel_values, **batches[0]).logits_per_image
    torch.testing.assert_close(torch.from_numpy(logits), wanted.detach(), atol=1e-3, rtol=0)
    assert actual.caption_images(pictures[:5]) == expected.caption_images(pictures[:5])


# --------------------------------------------------------------------------------------------- rules of captions

RULES = [
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "repetition_penalty",
]


def rules_for(ids: torch.Tensor) -> dict:
    """Rules that forbid captions (images, tokens) what they say often; behind `end` a caption ends early."""
    kinds, counts = ids[:, 1:].unique(return_counts=True)
    often = [kind for kind in kinds[counts.argsort(descending=True)].tolist() if kind > 2]
    values = often[1:2], ids[:, 1].unique().tolist(), [often[2:3], ids[0, 2:4].tolist()], 9, 7, 2, 3.0
    return {"end": often[0], **dict(zip(RULES, values, strict=True))}


@pytest.fixture(scope="module", params=["mome", "coca"])
def family(request) -> tuple[Path, Path]:
    if request.param == "coca":
        return request.getfixturevalue("coca")
    return request.getfixturevalue("checkpoint"), request.getfixturevalue("exported")


def with_rules(folder: Path, copy: Path, **rules) -> Path:
    shutil.copytree(folder, copy)
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | rules))
    return copy


@pytest.mark.parametrize("names", [*([name] for name in RULES), RULES[:4], RULES], ids=[*RULES, "some", "all"])
def test_captions_keep_to_the_checkpoints_generation_config(family, names, pictures, tmp_path):
    plain = OnnxEmbedder.load(family[1], "fp32", captions=True)
    images = torch.cat(list(plain.pixel_batches(pictures)))
    rules = rules_for(plain.caption_ids(images, 12))
    end = {"eos_token_id": [2, rules["end"]]}
    rules = {name: rules[name] for name in names}
    captioner = Embedder.load(with_rules(family[0], tmp_path / "torch", **rules, **end), "cpu", captions=True)
    actual = OnnxEmbedder.load(with_rules(family[1], tmp_path / "onnx", **rules, **end), "fp32", captions=True)
    free = OnnxEmbedder.load(with_rules(family[1], tmp_path / "free", **end), "fp32", captions=True)
    prompt = torch.tensor([[1, 9, 8]]).expand(len(images), -1)
    prompt = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    changed = 0
    for given in ({}, prompt):
        options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1}
        expected = captioner.model.generate(pixel_values=images, **given, **options)
        found = actual.caption_ids(images, 12, given or None)
        assert torch.equal(found, expected)
        before = free.caption_ids(images, 12, given or None)
        changed += before.shape != found.shape or not torch.equal(before, found)
    assert changed, "the rules change nothing here"
    assert actual.caption_images(pictures) == captioner.caption_images(pictures)


def test_rules_that_an_export_cannot_keep_to_are_refused(family, pictures, tmp_path, capsys):
    folder, export = family
    for number, (name, value) in enumerate(
        {"guidance_scale": 2.0, "rerank_weight": 0.5, "contrastive_weight": 1.0, "forced_eos_token_id": 2}.items()
    ):
        copy = with_rules(export, tmp_path / f"{number}-onnx", **{name: value})
        with pytest.raises(MomeError, match=rf"{name}={value}: captions of an export are greedy and can't keep to it"):
            OnnxEmbedder.load(copy, captions=True)
        assert OnnxEmbedder.load(copy).embed_images(pictures[:1]).shape[0] == 1
    copy = with_rules(folder, tmp_path / "torch", guidance_scale=1.5)
    assert "guidance_scale=1.5" in refused(str(copy), "--output", str(tmp_path / "out"), capsys=capsys)
    for text in (
        '{"min_length":',
        "[]",
        '{"bad_words_ids": "no"}',
        '{"min_length": -1}',
        '{"suppress_tokens": ["a"]}',
    ):
        (copy / "generation_config.json").write_text(text)
        line = refused(str(copy), "--output", str(tmp_path / "out"), capsys=capsys)
        assert "generation_config.json is no generation config: " in line, text
    neutral = with_rules(export, tmp_path / "neutral", guidance_scale=1, rerank_weight=0, repetition_penalty=1.0)
    assert OnnxEmbedder.load(neutral, captions=True).caption_images(pictures[:2])
    penalty = OnnxEmbedder.load(with_rules(export, tmp_path / "penalty", repetition_penalty=1.5), captions=True)
    prompt = {"input_ids": torch.tensor([[1, 9], [0, 1]]), "attention_mask": torch.tensor([[1, 1], [0, 1]])}
    with pytest.raises(MomeError, match=r"repetition_penalty=1\.5 counts the padding of prompts of different lengths"):
        penalty.caption_ids(torch.cat(list(penalty.pixel_batches(pictures[:2]))), 5, prompt)


def test_an_export_without_captions_beside_a_decoder_is_refused(family, pictures, tmp_path):
    """Never captions of no image: the vision model of an embedding export of the same weights has no `present.*`."""
    folder, export = family
    model = Embedder.load(folder, "cpu").model
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    for file in (copy / "onnx").glob("*_*[dh6].onnx"):
        if file.name.startswith("vision_model"):
            file.unlink()
    embedding = export_checkpoint(saved(tmp_path / "embedding", model=model), tmp_path / "out", ["fp32"]).output
    shutil.copy(embedding / "onnx" / "vision_model.onnx", copy / "onnx" / "vision_model.onnx")
    with pytest.raises(MomeError, match=r"gives no past_key_values\.\S+: it is of an export without captions"):
        OnnxEmbedder.load(copy, captions=True).caption_images(pictures[:1])


# -------------------------------------------------------------------------------------------------- in its place


def test_an_export_embeds_a_corpus_and_searches_tables_of_its_checkpoint(checkpoint, exported, pictures, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pictures[:6]):
        picture.save(tmp_path / "pictures" / f"{number}.png")
    made = embed_corpus(tmp_path / "pictures", tmp_path / "onnx.parquet", exported, progress=False)
    embed_corpus(tmp_path / "pictures", tmp_path / "torch.parquet", checkpoint, progress=False)
    assert made.rows == 6
    by_onnx = Searcher.open(tmp_path / "onnx.parquet")  # the table names the export
    assert isinstance(by_onnx.embedder, OnnxEmbedder) and by_onnx.embedder.export_dtype == "fp32"
    across = Searcher.open(tmp_path / "torch.parquet", exported, backend="onnx-q8")
    assert across.embedder.export_dtype == "q8"
    expected = [hit.id for hit in Searcher.open(tmp_path / "torch.parquet").search(text="a red circle")]
    assert [hit.id for hit in by_onnx.search(text="a red circle")] == expected
    assert across.search(image=pictures[3])[0].id == "3.png"
    arguments = ["search", str(tmp_path / "onnx.parquet"), "a red circle", "--backend", "onnx", "--json"]
    found = CliRunner().invoke(cli.app, arguments)
    assert [hit["id"] for hit in json.loads(found.stdout)] == expected


def test_a_folder_with_both_takes_the_backend_that_is_asked_for(checkpoint, exported, tmp_path):
    both = Path(shutil.copytree(checkpoint, tmp_path / "both"))
    shutil.copytree(exported / "onnx", both / "onnx")
    assert type(load_embedder(both, device="cpu")) is Embedder
    assert load_embedder(both, "onnx").export_dtype == "fp32"
    assert load_embedder(both, "torch", "cpu").fingerprint == load_embedder(both, "onnx-q8").fingerprint
    with pytest.raises(MomeError, match="backend='tensorrt': choose torch, onnx, onnx-fp32"):
        load_embedder(both, "tensorrt")
    with pytest.raises(MomeError, match="device='cuda': an export runs on the CPU"):
        load_embedder(both, "onnx", "cuda")


def test_an_export_is_published_with_its_own_checkpoint_only(checkpoint, exported, tmp_path):
    folder = build_folder(checkpoint, tmp_path / "published", "me/mine", onnx=exported)
    assert len(list((folder / "onnx").glob("*.onnx"))) == 8 and (folder / "preprocessor_config.json").is_file()
    assert type(load_embedder(folder, device="cpu")) is Embedder and load_embedder(folder, "onnx").dimension == 16
    with pytest.raises(ValueError, match="was made of other weights"):
        build_folder(saved(tmp_path / "other", seed=1), tmp_path / "no", "me/mine", onnx=exported)
    with pytest.raises(FileNotFoundError, match="holds no export"):
        build_folder(checkpoint, tmp_path / "no", "me/mine", onnx=checkpoint)


# ---------------------------------------------------------------------------------------------------- refusals


def refused(*arguments: str, capsys) -> str:
    assert command.main(list(arguments)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mome.export: ")]
    (line,) = lines
    return line


def test_what_cannot_be_exported_is_one_line(checkpoint, tmp_path, capsys):
    there = tmp_path / "there"
    there.mkdir()
    assert f"output {there} exists" in refused(str(checkpoint), "--output", str(there), capsys=capsys)
    out = str(tmp_path / "out")
    assert "dtype 'int4': choose from fp32, q8, fp16" in refused(
        str(checkpoint), "--output", out, "--dtype", "int4", capsys=capsys
    )
    with pytest.raises(ExportError, match="^dtypes is empty: choose from fp32, q8, fp16$"):
        export_checkpoint(checkpoint, out, [])
    with pytest.raises(ExportError, match="^dtype 'int4': choose"):
        export_checkpoint(checkpoint, out, "int4")
    assert "no such folder" in refused(str(tmp_path / "nowhere"), "--output", out, capsys=capsys)
    other = Path(shutil.copytree(checkpoint, tmp_path / "siglip"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    line = refused(str(other), "--output", out, capsys=capsys)
    assert "holds a model of type 'siglip': only 'mome' or 'coca' can be exported" in line
    (other / "config.json").write_text("{")
    assert "is no config" in refused(str(other), "--output", out, capsys=capsys)
    (other / "config.json").write_text(json.dumps(config))
    (other / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(str(other), "--output", out, capsys=capsys)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_a_type_that_does_not_agree_is_not_kept(checkpoint, exported, tmp_path, monkeypatch):
    """Graphs whose norms have their weights in another order."""
    from mome.export import folder

    files = iter(f"{part}.onnx" for part in PARTS)

    def wrong(module) -> onnx.ModelProto:
        graph = onnx.load(exported / "onnx" / next(files))
        for weight in graph.graph.initializer:
            if weight.name.endswith("norm.image.weight"):
                values = onnx.numpy_helper.to_array(weight)
                weight.CopyFrom(onnx.numpy_helper.from_array(values[::-1].copy(), weight.name))
        return graph

    monkeypatch.setattr(folder, "graph_of", wrong)
    with pytest.raises(ExportError, match="type fp32: embeddings of images have a cosine of"):
        export_checkpoint(checkpoint, tmp_path / "out", ["fp32"])
    assert not list(tmp_path.iterdir())


def test_damaged_and_mixed_files_are_refused_by_name(exported, tmp_path):
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    file = copy / "onnx" / "text_model.onnx"
    whole = file.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not a graph" * 99):
        file.write_bytes(damage)
        with pytest.raises(MomeError, match=r"text_model\.onnx is no whole ONNX file") as error:
            load_embedder(copy)
        assert "\n" not in str(error.value)
    graph = onnx.load_from_string(whole)
    onnx.helper.set_model_props(graph, {"mome_fingerprint": "0" * 16})
    onnx.save(graph, file)
    with pytest.raises(MomeError, match="are of different exports"):
        load_embedder(copy)
    file.unlink()
    with pytest.raises(MomeError, match=r"text_model\.onnx is missing"):
        load_embedder(copy)
    assert load_embedder(copy, "onnx-q8").dimension == 16
    with pytest.raises(MomeError, match=r"it has no onnx/vision_model_fp16\.onnx, only type fp32, q8"):
        load_embedder(copy, "onnx-fp16")


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("onnxruntime", ["search", "TABLE", "a cat", "--model", "EXPORT"]),
        ("onnxscript", ["export", "CHECKPOINT", "--output", "OUT"]),
    ],
)
def test_a_missing_package_is_one_line_with_its_extra(checkpoint, exported, tmp_path, missing, arguments):
    from retrieval_corpora import make_table

    places = {
        "TABLE": str(make_table(tmp_path / "table.parquet", rows=9)),
        "EXPORT": str(exported),
        "CHECKPOINT": str(checkpoint),
        "OUT": str(tmp_path / "out"),
    }
    hidden = f"import sys; sys.modules[{missing!r}] = None; from mome.cli import main; main()"
    words = [places.get(word, word) for word in arguments]
    done = subprocess.run([sys.executable, "-c", hidden, *words], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("mome: ")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].endswith(f'{missing} is not installed: pip install -e ".[onnx]"')
