"""Padding without a mask: every pass finds it by the pad id, and a mask that is given wins."""

import pytest
import torch

from models import pad_left, random_batch, tiny_captioner, tiny_config
from mome.inputs_mome import text_mask

VARIANTS = ("dense", "routed", "relative", "unshared", "vlmo", "masked")


@pytest.fixture(params=VARIANTS)
def captioner(request):
    return tiny_captioner(request.param)


def padded(config, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, ids and mask of three pairs; the ids are padded on one side, and one text has the pad id inside."""
    batch = random_batch(config)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids[2, 3] = config.pad_token_id
    if side == "left":
        ids, mask = pad_left(ids, mask), pad_left(mask, mask)
    return batch["pixel_values"], ids, mask


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_pad_id_is_the_mask_where_none_is_given(captioner, side):
    images, ids, mask = padded(captioner.config, side)
    given = {"input_ids": ids, "pixel_values": images}
    passes = {
        "text": lambda **mask: captioner.get_text_features(ids, **mask).pooler_output,
        "both": lambda **mask: captioner.model(**given, **mask, return_loss=True).loss,
        "text alone": lambda **mask: captioner.model(input_ids=ids, **mask).text_embeds,
        "fused": lambda **mask: captioner.model.get_multimodal_features(images, ids, **mask).pooler_output,
        "caption": lambda **mask: captioner(**given, **mask).logits[:, -1],
        "caption without an image": lambda **mask: captioner(input_ids=ids, **mask).logits[:, -1],
        "training": lambda **mask: captioner(**given, labels=ids.masked_fill(ids == 0, -100), **mask).loss,
    }
    for name, run in passes.items():
        with torch.no_grad():
            torch.testing.assert_close(run(), run(attention_mask=mask), msg=name)


def test_a_padded_batch_has_the_embeddings_of_its_texts_alone(captioner):
    _, ids, mask = padded(captioner.config, "right")
    with torch.no_grad():
        together = captioner.get_text_features(ids).pooler_output
        alone = [captioner.get_text_features(row[None, seen.bool()]).pooler_output for row, seen in zip(ids, mask)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_mask_that_is_given_wins():
    captioner = tiny_captioner()
    _, ids, mask = padded(captioner.config, "right")
    with torch.no_grad():
        default = captioner.get_text_features(ids).pooler_output
        everything = captioner.get_text_features(ids, torch.ones_like(ids)).pooler_output
    assert (default[1] - everything[1]).abs().max() > 1e-3
    torch.testing.assert_close(default[0], everything[0])


@pytest.mark.parametrize(
    ("special", "ids", "expected"),
    [
        ({}, [0, 1, 7, 0, 8, 2, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0]),
        ({}, [0, 0, 0, 0], [1, 1, 1, 1]),  # no text of its own: left as it is
        ({"pad_token_id": 2}, [1, 7, 2, 2, 2], [1, 1, 1, 0, 0]),  # padded with [EOS]
        ({"pad_token_id": 2}, [2, 2, 1, 7, 2], [0, 0, 1, 1, 1]),
        ({"pad_token_id": 1}, [1, 1, 1, 7, 2], [0, 0, 1, 1, 1]),  # padded with [BOS]
    ],
)
def test_where_padding_is(special, ids, expected):
    config, ids = tiny_config(**special), torch.tensor([ids])
    assert text_mask(config, ids, None).tolist() == [expected]
    assert text_mask(config, torch.tensor([[7, 8, 9]]), None) is None


def test_an_exported_text_tower_finds_padding_too():
    model = tiny_captioner().model
    _, ids, _ = padded(model.config, "right")

    class Texts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model.get_text_features(input_ids).pooler_output

    exported = torch.export.export(Texts(), (ids,)).module()
    compiled = torch.compile(Texts(), backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = Texts()(ids)
        torch.testing.assert_close(exported(ids), expected)
        torch.testing.assert_close(compiled(ids), expected)
