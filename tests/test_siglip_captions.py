"""SigLIP learns to caption by the recipe `caption-siglip.yaml`: on icons, with a tiny model, in seconds."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

from mome.cards import SUMMARY
from mome.convert.__main__ import main as convert
from mome.publish import build_folder
from mome.training.model import build_model
from mome.training.recipe import Recipe
from mome.training.trainer import main as train
from siglip_models import IMAGES, SHAPES, save_siglip
from training_runs import losses_of

ROOT = Path(__file__).parents[1]
ICONS = sorted((ROOT / "samples").glob("*.png"))[:12]
NAMES = [path.stem.replace("-", " ") for path in ICONS]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CI = {"steps": 120, "batch_size": 12, "learning_rate": 4e-3, "warmup_steps": 10, "max_text_tokens": 16}
CI |= {"checkpoint_every": 0, "log_every": 1, "tracker": "none", "ema_decay": None, "label_smoothing": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Icons with their names as a data set, and a tiny SigLIP whose vocabulary has their letters."""
    folder = tmp_path_factory.mktemp("captions")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in ICONS], "text": NAMES}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(folder / "icons")
    SHAPES["captions"], IMAGES["captions"] = SIZES, {"image_size": 64, "patch_size": 16}
    save_siglip(folder / "upstream", "captions", words=" ".join(NAMES))
    return folder


def run(folder: Path, name: str, *conversion: str, **changes) -> tuple[Path, Path]:
    """Converts, trains, and returns both folders."""
    start, output = folder / f"{name}-start", folder / name
    assert convert(["siglip", "--checkpoint", str(folder / "upstream"), "--output", str(start), *conversion]) == 0
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / "caption-siglip.yaml").read_text())
    own = {"output": str(output), "checkpoint": str(start), "dataset": str(folder / "icons")}
    train(Recipe.from_dict(recipe | CI | own | changes))
    return start, output


@pytest.fixture(scope="module")
def frozen(folder):
    return run(folder, "frozen", "--caption")


@torch.no_grad()
def embeddings(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    processor, model = AutoProcessor.from_pretrained(path), AutoModel.from_pretrained(path)
    outputs = model(**processor(text=NAMES, images=[Image.open(icon) for icon in ICONS], return_tensors="pt"))
    return outputs.image_embeds, outputs.text_embeds


def captions(path: Path) -> list[str]:
    answers = pipeline("image-captioning", model=str(path))([str(icon) for icon in ICONS], max_new_tokens=16)
    return [answer[0]["generated_text"] for answer in answers]


def test_captions_come_and_embeddings_stay_bit_for_bit(frozen):
    start, output = frozen
    for before, after in zip(embeddings(start), embeddings(output)):
        assert torch.equal(before, after)
    before, after = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in frozen)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".caption." in name or name.startswith("lm_head.") for name in changed)
    assert not any(name.startswith("lm_head.decoder.weight") for name in changed)  # tied to the words
    losses = list(losses_of(output).values())
    assert losses[-1] < 0.1 * losses[0]
    assert captions(start) != NAMES and captions(output) == NAMES


def test_what_was_learnt_can_be_made_routed(frozen, tmp_path):
    command = [
        "mome",
        "--checkpoint",
        str(frozen[1]),
        "--experts-per-group",
        "3",
        "--output",
        str(tmp_path / "routed"),
    ]
    assert convert(command) == 0
    routed = AutoModelForImageTextToText.from_pretrained(tmp_path / "routed")
    assert {name.split(".")[5] for name in routed.state_dict() if "router" in name} == {"image", "text", "caption"}
    assert captions(tmp_path / "routed") == NAMES
    for before, after in zip(embeddings(frozen[1]), embeddings(tmp_path / "routed")):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_text_experts_may_learn_captions_themselves_while_images_follow_slowly(folder):
    rates = {"image_embedding.*": 0.001, "*.image.*": 0.001, "image_pooling.*": 0.001}
    changes = {"freeze": [], "rates": rates, "contrastive_weight": 1.0, "steps": 90, "learning_rate": 2e-3}
    start, output = run(folder, "shared", **changes)
    (images, texts), (images_after, texts_after) = embeddings(start), embeddings(output)
    assert not torch.equal(images, images_after) and (images * images_after).sum(dim=1).min() > 0.999
    assert (texts * texts_after).sum(dim=1).mean() < 0.99
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    contrastive = [record["contrastive"] for record in records if "contrastive" in record]
    assert contrastive[-1] < 0.9 * contrastive[0]  # the sigmoid loss, through texts alone
    assert captions(output) == NAMES


def test_adapters_and_a_new_card_take_it_for_the_mome_that_it_is(frozen, tmp_path):
    """In memory its config has a type of its own."""
    _, output = frozen
    recipe = {"checkpoint": str(output), "dataset": "icons", "output": str(tmp_path), "lora": {"r": 2}, **CI}
    model, _ = build_model(Recipe.from_dict(recipe))
    adapters = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert any("feed_forward.caption" in name for name in adapters)
    bare = shutil.copytree(output, tmp_path / "bare", ignore=shutil.ignore_patterns("README.md"))
    assert SUMMARY in (build_folder(bare, tmp_path / "published", "ada/captions") / "README.md").read_text()
