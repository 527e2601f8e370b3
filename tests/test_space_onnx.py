"""The Space with an export in place of its checkpoint: search, labels and greedy captions as the checkpoint's."""

import importlib.util

import numpy as np
import pytest

from app import build_demo
from models import tiny_coca
from mome_space.caption import Captioning
from mome_space.engine import Engine
from mome_space.loading import load_engine
from space_server import tiny_engine, tiny_index, write_picture

if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
    pytest.skip("onnx, onnxscript and onnxruntime are not installed", allow_module_level=True)

from mome.export.folder import export_checkpoint
from mome.onnx_embedder import OnnxEmbedder


def tiny_coca_engine() -> Engine:
    """As `tiny_engine`, of a CoCa."""
    like = tiny_engine()
    size = {"vocab_size": like.config.vocab_size, "max_position_embeddings": like.config.max_position_embeddings}
    model = tiny_coca(image_size=32, pad_token_id=0, **size)
    model.generation_config.suppress_tokens = like.model.generation_config.suppress_tokens
    return Engine(model, like.processor)


@pytest.fixture(scope="module", params=[tiny_engine, tiny_coca_engine], ids=["mome", "coca"])
def engines(request, tmp_path_factory):
    """The checkpoint's and the export's."""
    folder, expected = tmp_path_factory.mktemp("export"), request.param()
    expected.model.save_pretrained(folder / "tiny")
    expected.processor.save_pretrained(folder / "tiny")
    export_checkpoint(folder / "tiny", folder / "onnx", ["fp32"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_CHECKPOINT", str(folder / "onnx"))
        return expected, load_engine()


def test_an_export_embeds_and_classifies_as_its_checkpoint(engines, tmp_path):
    expected, actual = engines
    assert isinstance(actual.model, OnnxEmbedder)
    pictures = [actual.rgb(str(write_picture(tmp_path / f"{seed}.png", seed))) for seed in range(3)]
    np.testing.assert_allclose(actual.embed_images(pictures), expected.embed_images(pictures), atol=1e-5)
    texts = ["a circus tent", "dog"]
    np.testing.assert_allclose(actual.embed_texts(texts), expected.embed_texts(texts), atol=1e-5)
    arguments = pictures[0], ["dog", "tent"], ["{}", "a {}"]
    np.testing.assert_allclose(actual.classify(*arguments), expected.classify(*arguments), atol=1e-4)
    assert actual.fingerprint() != expected.fingerprint()


@pytest.mark.parametrize("prompt", ["", "a red", "dog"])
def test_an_export_captions_greedily_from_any_beginning(engines, tmp_path, prompt):
    expected, actual = engines
    pictures = [actual.rgb(str(write_picture(tmp_path / f"{seed}.png", seed))) for seed in range(3)]
    wanted, found = (each.caption(pictures, prompt, 1) for each in engines)
    assert [[text for text, _ in each] for each in found] == [[text for text, _ in each] for each in wanted]
    embeds = expected.embed_texts([each[0][0] for each in found])  # of words alone: captions may hold other tokens
    cosines = (expected.embed_images(pictures) * embeds).sum(axis=1)
    np.testing.assert_allclose([each[0][1] for each in found], cosines, atol=1e-4)
    guidance = {"rerank_weight": 0.5, "guidance_scale": 1, "contrastive_weight": 1}
    ((_, _, plain, guided),) = Captioning(actual).caption([str(tmp_path / "0.png")], prompt, 3, **guidance)
    assert plain == found[0] and guided is None


def test_the_page_of_an_export_has_no_routing_and_no_guidance(engines, tmp_path):
    _, engine = engines
    index = tiny_index(tmp_path, engine)
    assert index.ready and index.embeddings.image_shares is None
    demo = build_demo(engine.model, engine.processor, index)
    parts = demo.get_config_file()["components"]
    assert [part["props"]["id"] for part in parts if part["type"] == "tabitem"] == [
        "search",
        "caption",
        "classify",
        "about",
    ]
    sliders = [part["props"] for part in parts if str(part["props"].get("elem_id")).startswith("caption-")]
    assert not any(
        each["visible"] for each in sliders if each["elem_id"] in ("caption-candidates", "caption-rerank_weight")
    )
