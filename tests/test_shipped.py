"""The shipped weights answer today what they answered when they came, whatever release of transformers loads them.

`python tests/test_shipped.py` writes the answers anew, after new weights.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mome.configuration_mome import MomeConfig
from mome.modeling_mome import MomeForConditionalGeneration
from mome.processing_mome import MomeProcessor

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ("mome-icons", "mome-icons-small")
ANSWERS = ROOT / "tests" / "fixtures" / "shipped.npz"
IMAGES, TEXTS = ("eye", "circus-tent"), ("a part of the body", "circus tent")
# Processors add float32 products in other orders: entries of embeddings of length 1 differ by 1e-6 or so.
TOLERANCE = 1e-4


def answers(name: str) -> dict[str, np.ndarray]:
    """What a checkpoint makes of two samples and two texts: embeddings and greedy captions."""
    folder = ROOT / "checkpoints" / name
    processor = MomeProcessor.from_pretrained(folder)
    model = MomeForConditionalGeneration.from_pretrained(folder).eval()
    images = [Image.open(ROOT / "samples" / f"{each}.png") for each in IMAGES]
    inputs = processor(text=list(TEXTS), images=images, return_tensors="pt")
    with torch.no_grad():
        outputs = model.model(**inputs)
        captions = model.generate(pixel_values=inputs["pixel_values"], do_sample=False, max_new_tokens=8)
    return {
        "image_embeds": outputs.image_embeds.numpy(),
        "text_embeds": outputs.text_embeds.numpy(),
        "logits_per_image": outputs.logits_per_image.numpy(),
        "captions": np.array([each.strip() for each in processor.batch_decode(captions, skip_special_tokens=True)]),
    }


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_embeddings_and_captions_are_those_of_the_day_they_came(name):
    found = answers(name)
    with np.load(ANSWERS) as kept:
        wanted = {key.removeprefix(f"{name}/"): kept[key] for key in kept if key.startswith(f"{name}/")}
    assert found.keys() == wanted.keys() and found["captions"].tolist() == wanted["captions"].tolist()
    for key in ("image_embeds", "text_embeds"):
        np.testing.assert_allclose(found[key], wanted[key], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(found["logits_per_image"], wanted["logits_per_image"], atol=100 * TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_stored_in_float16_and_computed_in_float32(name):
    folder = ROOT / "checkpoints" / name
    with safe_open(folder / "model.safetensors", "pt") as weights:
        stored = {weights.get_slice(key).get_dtype() for key in weights.keys()}
    loaded = {each.dtype for each in MomeForConditionalGeneration.from_pretrained(folder).parameters()}
    assert stored == {"F16"} and loaded == {torch.float32}


def test_the_shipped_weights_choose_among_experts_and_the_small_ones_have_one_for_each_modality():
    configs = [MomeConfig.from_pretrained(ROOT / "checkpoints" / name) for name in CHECKPOINTS]
    assert [(each.experts_per_group, each.experts_per_token) for each in configs] == [(4, 2), (1, 1)]


if __name__ == "__main__":
    np.savez(ANSWERS, **{f"{name}/{key}": value for name in CHECKPOINTS for key, value in answers(name).items()})
