"""The mean of checkpoints: every tensor, and what is refused."""

import pytest
import torch

from builders import build_processor
from models import tiny_captioner
from mome import MomeForConditionalGeneration
from mome.training.average import average, main


def test_every_tensor_is_the_weighted_mean(tmp_path):
    models = [tiny_captioner("routed", seed) for seed in (0, 1)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        build_processor(16).save_pretrained(tmp_path / str(number))
    folders = [str(tmp_path / str(number)) for number in (0, 1)]
    main([*folders, "--weights", "0.25", "0.75", "--output", str(tmp_path / "mean")])
    found = MomeForConditionalGeneration.from_pretrained(tmp_path / "mean").state_dict()
    first, second = (model.state_dict() for model in models)
    assert found.keys() == first.keys() and len(found) > 20
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])
    assert (tmp_path / "mean" / "tokenizer.json").exists()


def test_one_whole_weight_is_that_model_itself():
    models = [tiny_captioner(seed=seed) for seed in (0, 1)]
    second = {name: tensor.clone() for name, tensor in models[1].state_dict().items()}
    assert all(torch.equal(tensor, second[name]) for name, tensor in average(models, [0, 1]).state_dict().items())


@pytest.mark.parametrize(
    ("others", "weights", "message"),
    [
        ([{}], [1.0], "2 models and 1 weights"),
        ([], [1.0], "1 models and 1 weights"),
        ([{}], [0.5, 0.6], "sum must be 1, not 1.1"),
        ([{}], [-0.5, 1.5], "must not be negative"),
        ([{"projection_dim": 8}], [0.5, 0.5], r"model 2 differs from the first: .*projection.* has shape \(8, 32\)"),
        ([{"num_hidden_layers": 3}], [0.5, 0.5], "not None"),
    ],
)
def test_what_has_no_mean_is_refused(others, weights, message):
    models = [tiny_captioner(), *(tiny_captioner(**fields) for fields in others)]
    with pytest.raises(ValueError, match=message):
        average(models, weights)
