"""The ablation compares what it says: equal parameters, equal samples, one thing changed at a time."""

import json

import pytest
import torch

from mome.configuration_mome import MomeConfig
from mome.experiments import ablation as ablate
from mome.modeling_mome import MomeForConditionalGeneration
from training_runs import MODEL, write_data


def captioner_of(recipe) -> MomeForConditionalGeneration:
    with torch.device("meta"):
        return MomeForConditionalGeneration(MomeConfig(vocab_size=6000, image_size=64, **recipe.model))


@pytest.mark.parametrize("width", [128, 256])
def test_hard_routed_variants_have_equal_parameters(width, tmp_path):
    counts = {
        name: ablate.active_parameters(captioner_of(ablate.recipe_for(name, 0, tmp_path, 10, width=width)))
        for name in ablate.VARIANTS
        if name != "mome-routed"
    }
    assert max(counts.values()) < 1.005 * min(counts.values()), counts


def test_routed_experts_are_active_to_the_same_extent(tmp_path):
    dense, routed = (ablate.recipe_for(name, 0, tmp_path, 10).model for name in ("mome", "mome-routed"))
    assert routed["experts_per_token"] * routed["expert_intermediate_size"] == dense["intermediate_size"]


def test_variants_differ_in_what_they_say_and_nothing_else(tmp_path):
    recipes = {name: ablate.recipe_for(name, 0, tmp_path, 10) for name in ablate.VARIANTS}
    one = recipes["mome"]
    assert {each.steps for each in recipes.values()} == {10}
    for each in recipes.values():
        assert (each.batch_size, each.learning_rate, each.augmentations) == (
            one.batch_size,
            one.learning_rate,
            one.augmentations,
        )
    assert [name for name, each in recipes.items() if not each.teacher] == ["mome-untaught"]
    assert [name for name, each in recipes.items() if not each.caption_weight] == ["dual", "mome-contrastive"]


@pytest.mark.parametrize("variant", ["dual", "mome-routed"])
def test_a_run_that_is_done_is_not_repeated(variant, tmp_path):
    fields = write_data(tmp_path)
    fields |= {
        "text_column": "text",
        "positive_column": None,
        "teacher": None,
        "compile": False,
        "dataset_options": {},
    }
    fields["evaluations"] = {"held out": {"dataset": fields["dataset"], "split": "validation"}}
    for name in ("output", "steps", "model"):
        fields.pop(name)
    recipe = ablate.recipe_for(variant, 0, tmp_path, 3, MODEL, **fields)
    figures = ablate.run(recipe)
    assert figures["pairs"] == 24 and ("caption_f1" in figures) == (variant != "dual")
    assert ("least_expert_share" in figures) == (variant == "mome-routed")
    done = tmp_path / f"{variant}-0" / "figures.json"
    done.write_text(json.dumps(figures | {"pairs": -1}))
    assert ablate.run(recipe)["pairs"] == -1


def test_the_table_has_means_and_ranges():
    runs = [dict.fromkeys(ablate.METRICS, value) | {"parameters": 2e6} for value in (0.1, 0.2)]
    table = ablate.table({"dual": runs})
    assert "| dual | 2.00 M | 15.0 ± 5.0 |" in table and "| – |" in table
