import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from mome.errors import RecipeError
from mome.training.device.recipe import DeviceRecipe
from mome.training.fields import explanations_of
from mome.training.recipe import Recipe

GIVEN = {"output": "out", "dataset": "data", "checkpoint": "model", "steps": 3}
RECIPES = sorted((Path(__file__).parent.parent / "training" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "unknown recipe field 'stepz': did you mean 'steps'?"),
        ({"steps": "many"}, "recipe field steps='many': expected int | None"),
        ({"batch_size": 2.5}, "recipe field batch_size=2.5: expected int"),
        ({"learning_rate": "fast"}, "recipe field learning_rate='fast': expected float"),
        ({"freeze": "text"}, "recipe field freeze='text': expected list[str]"),
        ({"evaluations": {"a": 3}}, "recipe field evaluations"),
        ({"compile": "yes"}, "recipe field compile='yes': expected bool"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"max_bad_share": 1.5}, "max_bad_share=1.5"),
        ({"epochs": 2.0}, "steps=3 and epochs=2.0: set exactly one"),
        ({"steps": None}, "steps=None and epochs=None: set exactly one"),
        ({"model": {}}, "set exactly one of checkpoint"),
        ({"contrastive_weight": 0.0, "caption_weight": 0.0}, "nothing would be learnt"),
        ({"dataset": None}, "the recipe lacks dataset"),
    ],
)
def test_a_bad_field_is_refused_in_one_line_that_names_it(change, message):
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        Recipe.from_dict(GIVEN | change)
    assert "\n" not in str(caught.value)


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GIVEN) + "learning_rate: 1e-3\nweight_decay: 1\nbetas: [0.9, 1e-1]\n")
    recipe = Recipe.from_yaml(path)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.betas) == (1e-3, 1.0, [0.9, 0.1])


def test_any_field_can_be_overridden_on_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GIVEN))
    changes = "--steps null --epochs 2 --lora {r:\\ 8} --betas [0.9,0.95] --resume --tracker none".replace("\\ ", "~")
    arguments = [each.replace("~", " ") for each in changes.split()]
    recipe = Recipe.from_command_line(["--config", str(path), *arguments])
    assert (recipe.steps, recipe.epochs, recipe.lora, recipe.resume) == (None, 2.0, {"r": 8}, True)
    assert recipe.betas == [0.9, 0.95] and recipe.tracker == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batchsize", "3"], "did you mean '--batch_size'?"),
        (["--steps", "many"], "recipe field steps='many'"),
        (["--config", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
    ],
)
def test_a_typo_on_the_command_line_is_an_error(arguments, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GIVEN))
    with pytest.raises(SystemExit) as caught:
        Recipe.from_command_line(["--config", str(path), *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_are_valid(path):
    of_device = "mome.training.device" in path.read_text()
    (DeviceRecipe if of_device else Recipe).from_yaml(path)


@pytest.mark.parametrize("kind", [Recipe, DeviceRecipe])
def test_every_field_is_explained_and_nothing_else(kind):
    explanations = explanations_of(kind)
    assert list(explanations.values()).count("") == 0
    assert sorted(explanations) == sorted(each.name for each in dataclasses.fields(kind))


def test_help_shows_every_field_with_its_explanation_and_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as caught:
        Recipe.from_command_line(["--help"])
    lines = {}
    for line in capsys.readouterr().out.splitlines():
        if line.lstrip().startswith("--"):
            option, _, text = line.strip().partition("  ")
            lines[option.split()[0]] = text.strip()
    assert caught.value.code == 0
    assert lines["--batch_size"].endswith("all are negatives of each other (default: 256)")
    assert lines["--dataset"].endswith("(required)") and lines["--lora"].endswith("(default: null)")
    assert lines["--betas"] == "of AdamW (default: [0.9, 0.98])"
    for each in dataclasses.fields(Recipe):
        assert re.search(r"\w.* \((default: .+|required)\)$", lines[f"--{each.name}"]), each.name
