"""int8 weights of torchao are saved and loaded like others, with the captions and without."""

import json

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from builders import build_processor
from models import random_batch, tiny_captioner
from mome.embedder import Embedder
from mome.loading_mome import with_loadable_names
from mome.modeling_mome import MomeForConditionalGeneration, MomeModel


def test_names_that_torchao_cannot_split_are_left_out_and_those_inside_of_a_captioner_are_there_twice():
    names = ["logit_scale", "model.logit_scale", "model.text.weight", "lm_head.weight"]
    metadata = {name: json.dumps({"_type": name}) for name in names} | {"tensor_names": json.dumps(names)}
    named = with_loadable_names(metadata, "model.")
    assert json.loads(named["tensor_names"]) == [*names[1:], "text.weight"]
    assert named["text.weight"] == metadata["model.text.weight"] and "lm_head.weight" in named
    assert with_loadable_names({"format": "pt"}, "model.") == {"format": "pt"}


def int8_weights(model: MomeModel) -> dict[str, torch.Tensor]:
    weights = {name: each for name, each in model.state_dict().items() if type(each).__name__ == "Int8Tensor"}
    return {name: each.dequantize() for name, each in weights.items()}


@torch.no_grad()
@pytest.mark.parametrize("variant", ["dense", "routed"])
def test_int8_weights_are_loaded_again_as_they_were_saved(variant, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    processor = build_processor(16)
    whole = tiny_captioner(variant, vocab_size=len(processor.tokenizer), hidden_size=64)
    whole.save_pretrained(tmp_path / "float")
    whole.model.save_pretrained(tmp_path / "embedder")
    config = TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())
    batch = random_batch(whole.config, 3, 7)
    for source, model_class in (("float", MomeForConditionalGeneration), ("embedder", MomeModel)):
        model = model_class.from_pretrained(tmp_path / source, quantization_config=config).eval()
        model.save_pretrained(tmp_path / f"{source}-int8")
        weights = int8_weights(model.model if model_class is MomeForConditionalGeneration else model)
        assert "image_projection.weight" in weights
        for loading in {model_class, MomeModel}:
            again = loading.from_pretrained(tmp_path / f"{source}-int8").eval()
            loaded = int8_weights(again if loading is MomeModel else again.model)
            assert loaded.keys() == weights.keys()
            assert all(torch.equal(loaded[name], weights[name]) for name in weights)
            embeds = (each.get_image_features(batch["pixel_values"]).pooler_output for each in (again, model, whole))
            actual, expected, in_float = embeds
            assert_close(actual, expected, atol=1e-3, rtol=0)
            assert F.cosine_similarity(actual, in_float).min() > 0.99
    processor.save_pretrained(tmp_path / "float-int8")
    embedder, captioner = (Embedder.load(tmp_path / "float-int8", "cpu", captions=each) for each in (False, True))
    embeds = embedder.embed_pixel_values(batch["pixel_values"])
    assert_close(embeds, captioner.embed_pixel_values(batch["pixel_values"]), atol=1e-3, rtol=0)
    assert embedder.fingerprint == captioner.fingerprint != Embedder(whole, processor).fingerprint
    ids = captioner.model.generate(pixel_values=batch["pixel_values"], max_new_tokens=5, do_sample=False)
    assert ids.shape[0] == 3
