"""What comes with a prompt: positions, ids that end a text, image tokens that a compiled graph can't look for."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models import VARIANTS, pad_left, random_batch, tiny_captioner
from mome import MomeConfig

every_variant = pytest.mark.parametrize("variant", VARIANTS)
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
KINDS = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "rerank": {"rerank_weight": 0.5, "rerank_candidates": 3},
    "contrastive": {"contrastive_weight": 2.0, "do_sample": False},
    "classifier-free": {"guidance_scale": 2.0, "do_sample": False},
}


def close(actual, expected):
    assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.fixture
def prompts():
    """Four images, and prompts of five or seven tokens padded on the left, with their positions."""
    batch = random_batch(tiny_captioner().config, size=4)
    mask = pad_left(batch["attention_mask"], batch["attention_mask"])
    return {
        "pixel_values": batch["pixel_values"],
        "input_ids": pad_left(batch["input_ids"], batch["attention_mask"]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 0),
    }


def first_and_all(captioner, inputs, **options):
    outputs = captioner.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(outputs.logits, dim=1), outputs.sequences


@every_variant
@pytest.mark.parametrize("layout", ["text", "right", "image tokens", "image tokens behind padding", "embeddings"])
def test_positions_of_a_prompt_are_those_of_its_text(variant, layout, prompts):
    """Given or not, wherever padding is, and whoever puts the image in."""
    captioner = tiny_captioner(variant)
    config, images = captioner.config, captioner.config.num_image_tokens
    inputs = dict(prompts)
    expected, _ = first_and_all(captioner, {**inputs, "position_ids": None}, **GREEDY)
    if layout == "right":
        inputs |= {
            name: each
            for name, each in random_batch(config, size=4).items()
            if name in ("input_ids", "attention_mask")
        }
        inputs["position_ids"] = torch.arange(7).expand(4, -1)
    elif layout.startswith("image tokens"):
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        ids, mask = F.pad(ids, (images, 0), value=config.image_token_id), F.pad(mask, (images, 0), value=1)
        if layout != "image tokens":
            ids, mask = pad_left(ids, mask), pad_left(mask, mask)
        positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 0)
        inputs |= {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    elif layout == "embeddings":
        inputs["inputs_embeds"] = captioner.get_input_embeddings()(inputs.pop("input_ids"))
    close(first_and_all(captioner, inputs, **GREEDY)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_change_no_kind_of_decoding(kind, prompts):
    captioner = tiny_captioner()
    captions = []
    for positions in (prompts["position_ids"], None):
        torch.manual_seed(0)
        captions.append(captioner.generate(**{**prompts, "position_ids": positions}, **KINDS[kind], max_new_tokens=5))
    assert torch.equal(*captions)


@every_variant
def test_positions_that_are_not_the_default_are_used(variant, prompts):
    """A text that starts at position 3 is not one that starts at 0: positions of the caller reach the model."""
    captioner = tiny_captioner(variant)
    ids, pixel_values = prompts["input_ids"][:1, :4], prompts["pixel_values"][:1]
    positions = torch.arange(3, 7)[None]
    logits, sequences = first_and_all(
        captioner, {"pixel_values": pixel_values, "input_ids": ids, "position_ids": positions}, **GREEDY
    )
    behind = torch.arange(3, 3 + sequences.shape[1] - 1)[None]
    whole = captioner(pixel_values=pixel_values, input_ids=sequences[:, :-1], position_ids=behind).logits
    close(logits, whole[:, 3:])
    if captioner.config.position_embedding_type == "absolute":
        default, _ = first_and_all(captioner, {"pixel_values": pixel_values, "input_ids": ids}, **GREEDY)
        assert (default[:, 0] - logits[:, 0]).abs().max() > 1e-3


def test_packed_rows_and_positions_without_the_image_are_refused(prompts):
    captioner = tiny_captioner()
    images = captioner.config.num_image_tokens
    inputs = {name: prompts[name][:1] for name in ("pixel_values", "input_ids")}
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with pytest.raises(ValueError, match="position_ids start again within a row"):
        captioner.generate(**inputs, position_ids=packed, **GREEDY)
    with pytest.raises(ValueError, match="position_ids start again within a row"):
        captioner(**inputs, position_ids=packed)
    with pytest.raises(ValueError, match="position_ids start again within a row"):
        captioner(input_ids=inputs["input_ids"], position_ids=packed)
    placed = F.pad(inputs["input_ids"], (images, 0), value=captioner.config.image_token_id)
    counted = torch.arange(images + 7)[None]
    with pytest.raises(ValueError, match=f"count them, the text starts at {images}"):
        captioner(pixel_values=inputs["pixel_values"], input_ids=placed, position_ids=counted - images)
    cache = captioner(**inputs, use_cache=True).cache
    with pytest.raises(ValueError, match=f"position_ids holds 3, but the {images} tokens of the image"):
        captioner(input_ids=inputs["input_ids"][:, :1], position_ids=torch.tensor([[3]]), cache=cache)
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 3\), expected one for each token"):
        captioner.generate(**inputs, position_ids=packed[:, :3], **GREEDY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["config", "generation config", "argument"])
def test_several_ids_may_end_a_caption(kind, where, prompts):
    """The second of them ends it: what follows is padding, and the caption is that of the model without an end."""
    inputs = {**prompts, "position_ids": None}
    options = {**KINDS[kind], "max_new_tokens": 6}
    captioner = tiny_captioner()
    captioner.generation_config.eos_token_id = [2]
    torch.manual_seed(0)
    new = captioner.generate(**inputs, **options)[:, 7:]
    end = int(new[0, 2])
    captioner, ends = tiny_captioner(eos_token_id=[2, end] if where == "config" else 2), [2, end]
    assert captioner.generation_config.eos_token_id == ([2, end] if where == "config" else 2)
    if where == "generation config":
        captioner.generation_config.eos_token_id = ends
    elif where == "argument":
        options["eos_token_id"] = ends
    torch.manual_seed(0)
    found = captioner.generate(**inputs, **options)[:, 7:]
    for row in found:
        stops = [column for column, token in enumerate(row.tolist()) if token in ends]
        assert all(token == 0 for token in row[stops[0] + 1 :].tolist()) if stops else len(row) == 6
    if kind in ("greedy", "contrastive", "classifier-free"):
        for row, other in zip(found, new):
            length = next((place + 1 for place, token in enumerate(other.tolist()) if token in ends), len(other))
            assert row[:length].tolist() == other[:length].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_an_end_goes_on(kind, prompts):
    captioner = tiny_captioner(eos_token_id=None)
    assert captioner.generation_config.eos_token_id is None
    new = captioner.generate(**{**prompts, "position_ids": None}, **KINDS[kind], max_new_tokens=5)[:, 7:]
    assert new.shape == (4, 5)


def test_an_end_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"eos_token_id=\[2, 99\] is not an id of vocab_size=99"):
        MomeConfig(vocab_size=99, eos_token_id=[2, 99], hidden_size=32, num_attention_heads=4)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_captioner_that_is_not_told_of_image_tokens_says_so(fullgraph, prompts):
    captioner = tiny_captioner()
    images = captioner.config.num_image_tokens
    text = {name: prompts[name] for name in ("pixel_values", "input_ids")}
    placed = text | {"input_ids": F.pad(text["input_ids"], (images, 0), value=captioner.config.image_token_id)}
    torch.compiler.reset()
    compiled = torch.compile(captioner, fullgraph=fullgraph, backend="aot_eager")
    with torch.no_grad():
        close(compiled(**text).logits, captioner(**text).logits)
        with pytest.raises(RuntimeError, match="hold image tokens: pass image_tokens_in_input=True"):
            compiled(**placed)
        close(compiled(**placed, image_tokens_in_input=True).logits, captioner(**placed).logits)


@pytest.mark.parametrize("name", ["position_ids", "inputs_embeds", "head_mask", "token_type_ids"])
def test_inputs_that_the_text_pass_would_leave_out_are_refused(name, prompts):
    model, mask = tiny_captioner().model, prompts["attention_mask"]
    text = {"input_ids": prompts["input_ids"], "attention_mask": mask}
    with pytest.raises(ValueError, match=f"{name} changes nothing in the text pass"):
        model.get_text_features(**text, **{name: torch.ones_like(mask)})
    with pytest.raises(ValueError, match=f"{name} changes nothing in the text pass"):
        model.get_multimodal_features(prompts["pixel_values"], **text, **{name: torch.ones_like(mask)})
    features = model.get_text_features(**text, token_type_ids=torch.zeros_like(mask)).pooler_output
    close(features, model.get_text_features(**text).pooler_output)
