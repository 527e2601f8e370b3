"""Model cards: one writer, code that runs as it stands, a tag that `pipeline` takes, one list of figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

import mome
from builders import build_processor
from models import tiny_captioner
from mome import cards
from mome.cards import CAPTIONS, EMBEDDINGS, IMAGES, Card, Figure, figures_table, text_of, updated
from mome.convert import convert
from mome.convert.operations import Options
from mome.convert.upcycling import upcycle_checkpoint
from mome.training.recipe import Recipe
from mome.training.report import write_card
from upstream import golden, run, under

ROOT = Path(mome.__file__).resolve().parent

# Runs the code of every card in a fresh process without the package, from the folder that its path is relative to.
USE = """
import contextlib, io, json, os, re, sys
from transformers import pipeline
answers = {}
for folder, start in json.loads(sys.argv[1]).items():
    os.chdir(start)
    card = open(os.path.join(folder, "README.md")).read()
    (block,) = re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL)
    tag = re.search(r"^pipeline_tag: (.*)$", card, flags=re.MULTILINE)[1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, {})
    pipeline(tag, model=folder, trust_remote_code=True)
    answers[folder] = [tag, printed.getvalue()]
assert "mome" not in sys.modules
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder of each kind that gets a card, and the shipped checkpoint."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("trained", "beit3", "vlmo", "no tokenizer", "routed")}
    processor = build_processor(image_size=16)
    captioner = tiny_captioner(vocab_size=len(processor.tokenizer), max_position_embeddings=16)
    captioner.save_pretrained(made["trained"])
    processor.save_pretrained(made["trained"])
    recipe = Recipe(
        output=str(made["trained"]), dataset="icons", model={"size": "tiny"}, processor="words", steps=3,
        card={"license": "mit", "limitations": "Knows dots."},
    )  # fmt: skip
    history = {"pairs": 24, "bad": 1, "steps": 3}
    write_card(made["trained"], recipe, captioner, {"shapes": {"images": 8, "caption_f1": 0.25}}, history)
    beit3 = run("beit3", under("caption_sd/", golden("beit3")), made["beit3"])
    vlmo = run("vlmo", under("relpos/sd/", golden("vlmo")), made["vlmo"])
    upstream, bare = made["no tokenizer"] / "upstream.safetensors", made["no tokenizer"] / "out"
    save_file(under("relpos/sd/", golden("vlmo")), upstream)
    convert("vlmo", upstream, bare, with_tokenizer=False, options=Options())
    routed = upcycle_checkpoint(beit3, made["routed"] / "out", 4).output
    return {"trained": made["trained"], "beit3": beit3, "vlmo": vlmo, "no tokenizer": bare, "routed": routed}


def test_the_code_of_every_card_runs_and_its_tag_is_a_pipeline_that_loads(folders, tmp_path):
    starts = {str(folder): str(tmp_path) for folder in folders.values()}
    starts |= {"checkpoints/mome-icons": str(ROOT)}
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    os.symlink(ROOT / "checkpoints", tmp_path / "checkpoints")
    starts["checkpoints/mome-icons"] = starts["checkpoints/mome-icons-small"] = str(tmp_path)
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-S", "-c", USE, json.dumps(starts)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    tags = {folder: tag for folder, (tag, _) in answers.items()}
    assert tags == {
        str(folders["trained"]): CAPTIONS,
        str(folders["beit3"]): CAPTIONS,
        str(folders["routed"]): CAPTIONS,
        str(folders["vlmo"]): EMBEDDINGS,
        str(folders["no tokenizer"]): IMAGES,
        "checkpoints/mome-icons": CAPTIONS,
        "checkpoints/mome-icons-small": CAPTIONS,
    }
    for folder, (tag, printed) in answers.items():
        assert ("generated_text" in printed) == (tag == CAPTIONS) and ("label" in printed) == (tag != IMAGES), folder


def test_a_card_of_a_run_tells_data_training_figures_and_limits(folders):
    card = ModelCard.load(folders["trained"] / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    assert {"mome", "custom_code", "image-captioning"} <= set(card.data.tags) and "base_model" not in card.content
    for words in ("24 pairs seen, 1 rows left out", "From scratch. 3 steps of 256 pairs", "Knows dots.", "parameters"):
        assert words in card.text
    assert "| shapes, 8 images | 25.0 % |" in card.text
    assert [(each.dataset_name, each.metric_name, each.metric_value) for each in card.data.eval_results] == [
        ("shapes", "images", 8),
        ("shapes", "caption_f1", 0.25),
    ]


def test_a_base_model_is_named_where_it_is_one_of_the_hub(folders, tmp_path):
    captioner = tiny_captioner()
    for checkpoint, named in (("ada/tiny-mome", True), (str(folders["trained"]), False)):
        recipe = Recipe(output=str(tmp_path), dataset="icons", checkpoint=checkpoint, steps=3, caption_weight=0.0)
        write_card(tmp_path, recipe, captioner, {}, {"pairs": 24, "bad": 0, "steps": 3})
        card = ModelCard.load(tmp_path / "README.md")
        assert (card.data.base_model == checkpoint) == named and f"From `{checkpoint}`." in card.text
        assert card.data.pipeline_tag == EMBEDDINGS and "image-captioning" not in card.content  # no captions learnt
        assert "## Figures" not in card.text


def test_an_upcycled_card_has_the_new_folder_and_counts(folders):
    dense, routed = ((folders[name] / "README.md").read_text() for name in ("beit3", "routed"))
    assert f'path = "{folders["routed"]}"' in routed and str(folders["beit3"]) not in routed
    assert "one each, hard routing" in dense and "2 of 4, learned routing" in routed
    assert "scaled to −1…1" in dense and "scaled to −1…1" in routed


FIGURES = [
    Figure("shapes", "images", 1000),
    Figure("shapes", "text_to_image_r1", 0.412),
    Figure("shapes", "caption_bleu4", 0.12345),
    Figure("dots", "text_to_image_r1", 0.25),
    Figure("dots", "caption_f1", 0.2997),
]


def test_shares_stand_under_headings_and_other_figures_in_rows():
    assert figures_table(FIGURES).splitlines() == [
        "|  | R@1 text → image | caption F1 |",
        "| --- | --- | --- |",
        "| shapes, 1,000 images | 41.2 % | – |",
        "| dots | 25.0 % | 30.0 % |",
        "",
        "| data | metric | value |",
        "| --- | --- | --- |",
        "| shapes | caption_bleu4 | 0.1235 |",
    ]


def test_an_updated_card_loads_from_elsewhere_and_keeps_everything_else():
    text = text_of(
        Card("dots", "runs/dots", CAPTIONS, figures=FIGURES, limitations="Few.", sections={"Data": "Dots."})
    )
    later = updated(text, "ada/dots", revision="main", figures=[Figure("dots", "caption_f1", 0.5)])
    assert "runs/dots" in text and "runs/dots" not in later
    assert 'path = "ada/dots"' in later and 'revision="main"' in later and "## Data\n\nDots." in later
    assert "| dots | 25.0 % | 50.0 % |" in later and "| shapes, 1,000 images | 41.2 % | – |" in later
    values = {(each.dataset_name, each.metric_name): each.metric_value for each in ModelCard(later).data.eval_results}
    assert values == {(each.data, each.metric): each.value for each in FIGURES} | {("dots", "caption_f1"): 0.5}
    assert updated(later, "ada/dots", revision="main") == later
    assert updated(text, "runs/dots") == text == updated(text)
    assert (
        ModelCard(later).data.model_name == "dots" and ModelCard(updated(text, "ada/other")).data.model_name == "dots"
    )


def test_a_tag_that_transformers_no_longer_has_is_replaced_and_other_words_stay():
    own = "---\nlicense: mit\npipeline_tag: image-to-text\ntags: [icons]\n---\n\nMy own words.\n"
    card = ModelCard(updated(own, "ada/dots", CAPTIONS, "main", metadata={"license": "apache-2.0", "language": "en"}))
    assert card.data.pipeline_tag == CAPTIONS and card.data.license == "mit" and card.data.language == "en"
    assert card.text.strip() == "My own words." and {"icons", "mome"} <= set(card.data.tags)


def test_every_task_of_a_card_is_one_that_transformers_knows():
    from transformers.pipelines import PIPELINE_REGISTRY

    supported = PIPELINE_REGISTRY.get_supported_tasks()
    assert set(cards.TASKS) <= set(supported) and "image-to-text" not in supported
