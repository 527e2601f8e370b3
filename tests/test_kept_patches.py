"""An image pass with patches left out, and what is not looked at when values need not be."""

import pytest
import torch

from models import random_batch, tiny_captioner
from mome.modeling_mome import MomeForConditionalGeneration

VARIANTS = ["dense", "routed", "unshared", "relative", "vlmo"]


def image_pass(model, batch, kept=None):
    return model.model.image_pass(batch["pixel_values"], kept_patches=kept, return_key_values=True)


def image_embeds(model, outputs):
    return model.model.project_image(outputs.last_hidden_state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_patches_in_any_order_are_the_whole_image(variant):
    model = tiny_captioner(variant)
    batch = random_batch(model.config)
    order = torch.stack([torch.randperm(4) for _ in range(3)])
    whole, kept = image_pass(model, batch), image_pass(model, batch, order)
    assert torch.allclose(image_embeds(model, whole), image_embeds(model, kept), atol=1e-5)
    places = torch.cat([torch.zeros(3, 1, dtype=torch.long), order + 1], dim=1)[..., None]
    moved = whole.last_hidden_state.take_along_dim(places, dim=1)
    assert torch.allclose(moved, kept.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_left_out_does_not_matter_and_what_is_kept_does(variant):
    model = tiny_captioner(variant)
    batch = random_batch(model.config)
    kept = torch.tensor([[0, 3]]).expand(3, -1)
    before = image_embeds(model, image_pass(model, batch, kept))
    side = model.config.patch_size
    if variant != "vlmo":  # whose convolutions see beyond a patch
        batch["pixel_values"][:, :, :side, side:] += 1.0  # patch 1
        assert torch.allclose(image_embeds(model, image_pass(model, batch, kept)), before, atol=1e-6)
    batch["pixel_values"][:, :, :side, :side] += 1.0  # patch 0
    assert not torch.allclose(image_embeds(model, image_pass(model, batch, kept)), before, atol=1e-3)


@pytest.mark.parametrize("variant", [*VARIANTS, "masked"])
def test_captions_go_on_from_the_patches_that_are_kept(variant):
    """With all of them, in any order, the logits are those of the whole image; with fewer, other ones."""
    model = tiny_captioner(variant)
    batch = random_batch(model.config)
    options = {"image_tokens_in_input": False, "use_cache": False}
    expected = model(**batch, **options).logits
    order = torch.tensor([[2, 0, 3, 1]]).expand(3, -1)
    shuffled = model(**batch, image_outputs=image_pass(model, batch, order), **options).logits
    fewer = model(**batch, image_outputs=image_pass(model, batch, order[:, :2]), **options).logits
    seen = batch["attention_mask"].bool()
    assert torch.allclose(shuffled[seen], expected[seen], atol=1e-4)
    assert fewer.shape == expected.shape and not torch.allclose(fewer[seen], expected[seen], atol=1e-3)
    loss = model(**batch, image_outputs=image_pass(model, batch, order[:, :2]), labels=batch["input_ids"], **options)
    assert loss.loss.isfinite()


def test_kept_patches_of_a_wrong_shape_and_image_tokens_beside_them_are_refused():
    model = tiny_captioner()
    batch = random_batch(model.config)
    for kept in (torch.zeros(2, 2, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long), torch.zeros(3).long()):
        with pytest.raises(ValueError, match=r"kept_patches has shape .*, expected \(images, kept\) = \(3, 1…4\)"):
            image_pass(model, batch, kept)
    image = image_pass(model, batch, torch.zeros(3, 1, dtype=torch.long))
    image_ids = torch.full((3, model.config.num_image_tokens), model.config.image_token_id)
    with pytest.raises(ValueError, match="image_outputs has 2 of 5: leave them out"):
        model(torch.cat([image_ids, batch["input_ids"]], dim=1), batch["pixel_values"], image_outputs=image)


def test_values_are_not_looked_at_where_the_model_is_told_so():
    model: MomeForConditionalGeneration = tiny_captioner("routed")
    batch = random_batch(model.config)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = model.get_text_features(ids, mask).pooler_output
    model.model.looks_at_values = False
    assert torch.allclose(model.get_text_features(ids, mask).pooler_output, expected, atol=1e-6)
    with pytest.raises(IndexError):
        model.get_text_features(ids + model.config.vocab_size)
    model.model.looks_at_values = True
    with pytest.raises(ValueError, match="vocab_size is 99"):
        model.get_text_features(ids + model.config.vocab_size)
