"""What a configuration accepts, refuses and keeps."""

import json

import pytest

from models import VARIANTS, tiny_config
from mome import MOME_SIZES, MomeConfig


@pytest.mark.parametrize("size", MOME_SIZES)
def test_named_sizes_take_overrides(size):
    config = MomeConfig.from_size(size, image_size=384, num_hidden_layers=3)
    assert config.hidden_size == MOME_SIZES[size]["hidden_size"]
    assert (config.num_image_tokens, config.num_hidden_layers) == (24 * 24 + 1, 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_equals_loaded(variant, tmp_path):
    config = tiny_config(variant)
    config.save_pretrained(tmp_path)
    loaded = MomeConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"transformers_version": ""} == config.to_dict() | {"transformers_version": ""}
    first = (tmp_path / "config.json").read_bytes()
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == first


def test_a_repository_in_a_loaded_auto_map_is_forgotten(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    auto_map = saved["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForZeroShotImageClassification",
    }
    saved["auto_map"] = {name: f"someone/else--{reference}" for name, reference in auto_map.items()}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert MomeConfig.from_pretrained(tmp_path).auto_map == auto_map


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hiden_size": 64}, "'hiden_size' .value 64.*did you mean 'hidden_size'"),
        ({"flux_capacitor": 1}, "'flux_capacitor'"),
        ({"max_length": 5}, "'max_length'"),
        ({"hidden_size": 100}, "hidden_size=100 .* num_attention_heads=12"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"hidden_size": "wide"}, "wide"),
        ({"image_size": 225}, "image_size=225 .* patch_size=16"),
        ({"patch_embedding_type": "conv_stem", "patch_size": 14}, "patch_size=14 must be a power of two"),
        ({"patch_embedding_type": "conv_stem", "hidden_size": 12}, "hidden_size=12 must be a multiple of 8"),
        ({"patch_embedding_type": "fourier"}, "fourier"),
        ({"fusion_start_layer": 12}, "fusion_start_layer=12"),
        ({"fusion_start_layer": -1}, "fusion_start_layer=-1"),
        ({"experts_per_token": 2}, "experts_per_token=2 is more than experts_per_group=1"),
        ({"shared_expert": True}, "shared_expert=True needs experts_per_group"),
        ({"expert_intermediate_size": 64}, "expert_intermediate_size=64 needs experts_per_group"),
        ({"caption_objective": "masked"}, "needs a mask_token_id"),
        ({"caption_objective": "telepathy"}, "telepathy"),
        ({"position_embedding_type": "rotary"}, "rotary"),
        ({"hidden_dropout": 1.5}, "hidden_dropout=1.5"),
        ({"hidden_act": "gelo"}, "hidden_act='gelo'.*did you mean 'gelu'"),
        ({"image_token_id": 40000}, "image_token_id=40000 .* vocab_size=30522"),
        ({"eos_token_id": -1}, "eos_token_id=-1"),
    ],
)
def test_unknown_keys_and_impossible_combinations_are_refused_by_value(values, message):
    with pytest.raises(Exception, match=message):
        MomeConfig(**values)


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match="'huge': choose one of tiny, small, base, large"):
        MomeConfig.from_size("huge")
