"""Captions through the stock `generate()`: cached = uncached, batched = single, left padding changes nothing."""

import pytest
import torch
import torch._inductor.config
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import CompileConfig, DynamicCache, StaticCache

from models import VARIANTS, pad_left, random_batch, tiny_captioner
from mome.captioning_mome import MomeCache, MomeCacheLayer
from mome.compatibility_mome import CACHE_NAME

every_variant = pytest.mark.parametrize("variant", VARIANTS)
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def close(actual, expected, atol=1e-5):
    assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture
def batch():
    return random_batch(tiny_captioner().config, size=4)


def logits_of(captioner, **kwargs):
    outputs = captioner.generate(**kwargs, output_logits=True, return_dict_in_generate=True)
    return outputs.sequences, torch.stack(outputs.logits, dim=1)


@every_variant
def test_cached_decoding_equals_uncached(variant, batch):
    captioner = tiny_captioner(variant)
    cached = logits_of(captioner, pixel_values=batch["pixel_values"], **GREEDY)
    uncached = logits_of(captioner, pixel_values=batch["pixel_values"], **GREEDY, use_cache=False)
    close(cached[1], uncached[1])
    assert torch.equal(cached[0], uncached[0])
    whole = captioner(pixel_values=batch["pixel_values"], input_ids=cached[0][:, :-1]).logits
    close(cached[1], whole)


@every_variant
def test_step_by_step_calls_without_image_tokens_equal_one_call(variant, batch):
    captioner = tiny_captioner(variant)
    ids = batch["input_ids"][::2]
    pixel_values = batch["pixel_values"][::2]
    whole = captioner(pixel_values=pixel_values, input_ids=ids).logits
    start = captioner(pixel_values=pixel_values, input_ids=ids[:, :3], use_cache=True)
    rest = [captioner(input_ids=ids[:, step : step + 2], cache=start.cache).logits for step in (3, 5)]
    close(torch.cat([start.logits, *rest], dim=1), whole)


@every_variant
@pytest.mark.parametrize("layout", ["text", "image tokens behind the padding", "image tokens before the padding"])
def test_left_padding_never_changes_captions(variant, layout, batch):
    captioner = tiny_captioner(variant)
    config, mask = captioner.config, batch["attention_mask"]
    ids, left_mask = pad_left(batch["input_ids"], mask), pad_left(mask, mask)
    images = config.num_image_tokens
    if layout == "image tokens behind the padding":
        ids = F.pad(batch["input_ids"], (images, 0), value=config.image_token_id)
        mask = F.pad(mask, (images, 0), value=1)
        ids, left_mask = pad_left(ids, mask), pad_left(mask, mask)
    elif layout == "image tokens before the padding":
        ids = F.pad(ids, (images, 0), value=config.image_token_id)
        left_mask = F.pad(left_mask, (images, 0), value=1)
    for use_cache in (True, False):
        inputs = {"pixel_values": batch["pixel_values"], "input_ids": ids, "attention_mask": left_mask}
        sequences, logits = logits_of(captioner, **inputs, **GREEDY, use_cache=use_cache)
        assert sequences.shape[1] == ids.shape[1] + 6
        for row in range(4):
            prompt = batch["input_ids"][row : row + 1, : int(batch["attention_mask"][row].sum())]
            alone = logits_of(captioner, pixel_values=batch["pixel_values"][row : row + 1], input_ids=prompt, **GREEDY)
            assert torch.equal(sequences[row, -6:], alone[0][0, -6:])
            close(logits[row], alone[1][0])


@every_variant
def test_logits_of_left_padded_rows_equal_those_of_unpadded_rows(variant, batch):
    captioner = tiny_captioner(variant)
    images, config = captioner.config.num_image_tokens, captioner.config
    ids, pixel_values = batch["input_ids"][::2], batch["pixel_values"][::2]
    placed = F.pad(ids, (images, 0), value=config.image_token_id)
    expected = captioner(pixel_values=pixel_values, input_ids=placed).logits
    padded = F.pad(placed, (9, 0), value=config.pad_token_id)
    mask = F.pad(torch.ones_like(placed), (9, 0))
    for position_ids in (None, (mask.cumsum(dim=1) - 1).clamp(min=0)):
        actual = captioner(
            pixel_values=pixel_values, input_ids=padded, attention_mask=mask, position_ids=position_ids
        ).logits
        close(actual[:, 9:], expected)


@every_variant
def test_the_image_is_encoded_once_for_all_beams_and_steps(variant, batch):
    captioner, images = tiny_captioner(variant), []
    captioner.model.image_embedding.register_forward_hook(lambda module, args, _: images.append(len(args[0])))
    sequences = captioner.generate(pixel_values=batch["pixel_values"], num_beams=3, num_return_sequences=2, **GREEDY)
    assert sequences.shape == (8, 7) and images == [4]


@every_variant
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=["greedy", "sample", "beams", "beam sample"],
)
def test_every_strategy_gives_the_same_with_and_without_cache(variant, options, batch):
    captioner = tiny_captioner(variant)
    captions = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        captions.append(
            captioner.generate(pixel_values=batch["pixel_values"], max_new_tokens=6, use_cache=use_cache, **options)
        )
    assert torch.equal(*captions)
    assert captions[0].shape[0] == 4 * options.get("num_return_sequences", 1)


@every_variant
def test_a_batch_equals_single_calls(variant, batch):
    captioner = tiny_captioner(variant)
    for options in ({}, {"num_beams": 3}):
        together = captioner.generate(pixel_values=batch["pixel_values"], **GREEDY, **options)
        for row, image in enumerate(batch["pixel_values"]):
            assert torch.equal(captioner.generate(pixel_values=image[None], **GREEDY, **options)[0], together[row])


@every_variant
def test_a_static_cache_gives_the_same(variant, batch):
    captioner = tiny_captioner(variant)
    mask = batch["attention_mask"]
    inputs = {
        "pixel_values": batch["pixel_values"],
        "input_ids": pad_left(batch["input_ids"], mask),
        "attention_mask": pad_left(mask, mask),
    }
    expected = logits_of(captioner, **inputs, **GREEDY)
    actual = logits_of(captioner, **inputs, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(actual[0], expected[0])
    close(actual[1], expected[1])


def test_a_static_cache_that_is_used_again_sees_the_new_image(batch):
    captioner = tiny_captioner()
    options = {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    text = {"input_ids": batch["input_ids"][:1, :3]}
    for inputs in ({"pixel_values": image[None]} for image in batch["pixel_values"]):
        assert torch.equal(captioner.generate(**inputs, **options), captioner.generate(**inputs, **GREEDY))
        assert torch.equal(captioner.generate(**text, **options), captioner.generate(**text, **GREEDY))


@every_variant
@pytest.mark.parametrize("placed", [True, False])
def test_drafts_from_the_prompt_give_the_greedy_caption(variant, placed, batch):
    captioner = tiny_captioner(variant)
    images = captioner.config.num_image_tokens
    for row in range(2):
        ids = batch["input_ids"][row : row + 1, :4]
        if placed:
            ids = F.pad(ids, (images, 0), value=captioner.config.image_token_id)
        inputs = {"pixel_values": batch["pixel_values"][row : row + 1], "input_ids": ids}
        expected = captioner.generate(**inputs, **GREEDY)
        assert torch.equal(captioner.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2), expected)


def test_a_draft_model_is_refused_where_there_is_an_image_and_right_where_there_is_none(batch):
    captioner, assistant = tiny_captioner(), tiny_captioner(seed=1)
    image = {"pixel_values": batch["pixel_values"][:1]}
    with pytest.raises(ValueError, match="assistant_model drafts captions without seeing the image"):
        captioner.generate(**image, **GREEDY, assistant_model=assistant)
    with pytest.raises(ValueError, match="assistant_early_exit drafts captions without seeing the image"):
        captioner.generate(**image, **GREEDY, assistant_early_exit=1)
    text = {"input_ids": batch["input_ids"][:1, :3]}
    calls = []
    captioner.register_forward_hook(lambda *_: calls.append(1))
    expected = captioner.generate(**text, **GREEDY)
    steps = len(calls)
    assert torch.equal(captioner.generate(**text, **GREEDY, assistant_model=assistant), expected)
    calls.clear()
    twin = tiny_captioner()
    assert torch.equal(captioner.generate(**text, **GREEDY, assistant_model=twin), expected)
    assert len(calls) < steps, "drafts of the same model must be accepted"


@every_variant
@pytest.mark.parametrize("placed", [True, False])
def test_generation_goes_on_from_a_cache(variant, placed, batch):
    captioner = tiny_captioner(variant)
    inputs = {"pixel_values": batch["pixel_values"], "input_ids": batch["input_ids"][:, :3]}
    if placed:
        images = captioner.config.num_image_tokens
        inputs["input_ids"] = F.pad(inputs["input_ids"], (images, 0), value=captioner.config.image_token_id)
    expected = captioner.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    first = captioner.generate(
        **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    inputs["input_ids"] = first.sequences
    for with_image in (True, False):
        if not with_image:
            del inputs["pixel_values"]
            first = captioner.generate(
                pixel_values=batch["pixel_values"],
                input_ids=expected[:, : first.sequences.shape[1] - 2],
                max_new_tokens=2,
                min_new_tokens=2,
                do_sample=False,
                return_dict_in_generate=True,
            )
        rest = captioner.generate(
            **inputs,
            cache=first[CACHE_NAME],
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
        )
        assert torch.equal(rest, expected)


@every_variant
def test_text_alone_is_a_language_model(variant, batch):
    captioner = tiny_captioner(variant)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    inputs = {"input_ids": pad_left(ids, mask), "attention_mask": pad_left(mask, mask)}
    cached = logits_of(captioner, **inputs, **GREEDY)
    close(cached[1], logits_of(captioner, **inputs, **GREEDY, use_cache=False)[1])
    with_image = logits_of(captioner, pixel_values=batch["pixel_values"], **inputs, **GREEDY)
    assert (cached[1] - with_image[1]).abs().max() > 1e-2


@every_variant
def test_a_prompt_may_end_in_eos_and_be_padded_on_the_right(variant, batch):
    captioner = tiny_captioner(variant)
    pixel_values, config = batch["pixel_values"][:2], captioner.config
    prompts = torch.tensor([[1, 20, 21, 2], [1, 22, 2, 0]])
    together = captioner.generate(pixel_values=pixel_values, input_ids=prompts, **GREEDY)
    assert together[:, :4].tolist() == [[0, 1, 20, 21], [0, 0, 1, 22]] and together.shape == (2, 10)
    for row, words in enumerate(([1, 20, 21], [1, 22])):
        alone = captioner.generate(pixel_values=pixel_values[row : row + 1], input_ids=torch.tensor([words]), **GREEDY)
        assert torch.equal(alone[0, -6:], together[row, -6:])
    empty = captioner.generate(pixel_values=pixel_values, input_ids=torch.tensor([[2], [2]]), **GREEDY)
    assert torch.equal(empty, captioner.generate(pixel_values=pixel_values, **GREEDY))
    wide = captioner.generate(pixel_values=pixel_values, input_ids=F.pad(prompts, (0, 30)), **GREEDY)
    assert torch.equal(wide[:, 34:], together[:, 4:]), "padding takes no positions"
    assert (empty[:, 0] == config.bos_token_id).all()


@every_variant
@pytest.mark.parametrize("placed", [True, False])
def test_embeddings_of_a_prompt_give_the_caption_of_its_ids(variant, placed, batch):
    captioner = tiny_captioner(variant)
    prompt, pixel_values = batch["input_ids"][:, :3], batch["pixel_values"]
    expected = captioner.generate(pixel_values=pixel_values, input_ids=prompt, **GREEDY)[:, -6:]
    if placed:
        prompt = F.pad(prompt, (captioner.config.num_image_tokens, 0), value=captioner.config.image_token_id)
    embeds = captioner.get_input_embeddings()(prompt)
    assert torch.equal(captioner.generate(pixel_values=pixel_values, inputs_embeds=embeds, **GREEDY), expected)
    both = captioner.generate(pixel_values=pixel_values, input_ids=prompt, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(both[:, -6:], expected)


def test_lengths_count_text_and_end_with_the_position_table(batch):
    captioner, image = tiny_captioner(), batch["pixel_values"][:1]
    captioner.generation_config.eos_token_id = None
    assert captioner.generate(pixel_values=image).shape == (1, 21)
    assert captioner.generate(pixel_values=image, max_length=9).shape == (1, 9)
    assert captioner.generate(pixel_values=image, max_new_tokens=9).shape == (1, 10)
    assert captioner.generate(pixel_values=image, max_new_tokens=500).shape == (1, 24)
    captioner.generation_config.eos_token_id = 2
    suppressed = captioner.generate(pixel_values=image, min_length=8, max_length=8)
    assert suppressed.shape == (1, 8)
    with pytest.raises(ValueError, match="24 tokens leaves no room"):
        captioner.generate(pixel_values=image, input_ids=torch.full((1, 24), 9))
    with pytest.raises(ValueError, match="4 images and 2 prompts"):
        captioner.generate(pixel_values=batch["pixel_values"], input_ids=torch.full((2, 3), 9))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be an integer"),
        ({"max_new_tokens": "3"}, "max_new_tokens='3' must be an integer"),
        ({"max_length": 0}, "max_length=0 must be an integer"),
        ({"max_length": 1}, "max_length=1 counts the prompt, which has 1 tokens"),
        ({"input_ids": torch.ones(4, 3, dtype=torch.long), "max_length": 3}, "max_length=3 .* has 3 tokens"),
        ({"pixel_values": None, "inputs": torch.zeros(4, 3, 16, 16)}, "images are pixel_values=..."),
    ],
)
def test_lengths_and_prompts_that_cannot_be_are_named(options, message, batch):
    with pytest.raises(ValueError, match=message):
        tiny_captioner().generate(**{"pixel_values": batch["pixel_values"], **options})


def test_a_text_that_outgrows_the_position_table_is_refused_in_decoding(batch):
    captioner, cache = tiny_captioner(), DynamicCache()
    captioner(pixel_values=batch["pixel_values"], input_ids=torch.full((4, 23), 9), cache=cache)
    captioner(input_ids=torch.full((4, 1), 9), cache=cache)
    with pytest.raises(ValueError, match="25 tokens, max_position_embeddings is 24"):
        captioner(input_ids=torch.full((4, 1), 9), cache=cache)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_the_old_and_the_new_name_of_transformers(name, batch):
    captioner = tiny_captioner()
    ids, pixel_values = batch["input_ids"], batch["pixel_values"]
    whole = captioner(pixel_values=pixel_values, input_ids=ids).logits
    start = captioner(pixel_values=pixel_values, input_ids=ids[:, :3], use_cache=True)
    assert getattr(start, name) is start.cache is start[CACHE_NAME]
    words = batch["attention_mask"][:, 3:].bool()
    close(captioner(input_ids=ids[:, 3:], **{name: start.cache}).logits[words], whole[:, 3:][words])

    first = captioner.generate(
        pixel_values=pixel_values, return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 3}
    )
    more = captioner.generate(first.sequences, **{name: first[CACHE_NAME]}, **GREEDY | {"max_new_tokens": 2})
    at_once = captioner.generate(pixel_values=pixel_values, **GREEDY | {"max_new_tokens": 5})
    assert torch.equal(more, at_once)
    with pytest.raises(ValueError, match="two names for the same"):
        captioner(input_ids=ids[:, 3:], cache=start.cache, past_key_values=start.cache)


@every_variant
def test_logits_to_keep_keeps_the_last_ones(variant, batch):
    captioner = tiny_captioner(variant)
    images = captioner.config.num_image_tokens
    placed = F.pad(batch["input_ids"], (images, 0), value=captioner.config.image_token_id)
    mask = F.pad(batch["attention_mask"], (images, 0), value=1)
    inputs = {"pixel_values": batch["pixel_values"], "input_ids": placed, "attention_mask": mask}
    whole = captioner(**inputs).logits
    for keep in (1, 3, 7, 9):
        close(captioner(**inputs, logits_to_keep=keep).logits, whole[:, -keep:])
    some = torch.tensor([0, 6, 10])
    close(captioner(**inputs, logits_to_keep=some).logits, whole[:, some])
    for keep in (1, 3, 7):
        close(captioner(**batch, logits_to_keep=keep).logits, whole[:, -keep:])
    close(captioner(**batch, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [images, images + 3]])


@every_variant
def test_a_cache_that_runs_out_of_room_changes_no_caption(variant, batch, monkeypatch):
    captioner = tiny_captioner(variant)
    expected = logits_of(captioner, pixel_values=batch["pixel_values"], **GREEDY)
    monkeypatch.setattr(MomeCacheLayer, "room", 2)
    actual = logits_of(captioner, pixel_values=batch["pixel_values"], **GREEDY)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@torch.no_grad()
def test_a_token_is_written_into_the_cache_without_a_copy_of_it(batch):
    captioner = tiny_captioner()
    cache = captioner(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"], use_cache=True).cache
    before = cache.layers[0].keys
    captioner(input_ids=batch["input_ids"][:, :1], cache=cache)
    after = cache.layers[0].keys
    assert after.data_ptr() == before.data_ptr() and after.shape[2] == before.shape[2] + 1
    assert torch.equal(after[:, :, :-1], before)


def test_the_cache_does_what_a_dynamic_cache_does():
    torch.manual_seed(0)
    config = tiny_captioner().config
    caches = MomeCache(config), DynamicCache(config=config)
    steps = [torch.randn(2, 2, 4, tokens, 8) for tokens in (5, 1, 1, 3)]

    def update(states):
        states = states[:, : caches[0].layers[0].keys.shape[0]] if caches[0].get_seq_length() else states
        (keys, values), expected = (cache.update(*states, 0) for cache in caches)
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])

    update(steps[0])
    for operation in (
        lambda cache: cache.layers[0].crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    ):
        for cache in caches:
            operation(cache)
        for step in steps[1:]:
            update(step)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_beams_are_reordered_without_a_copy_of_the_room_and_leave_what_was_handed_out(monkeypatch):
    cache, copied = MomeCache(tiny_captioner().config), []
    keys, _ = cache.update(*torch.randn(2, 3, 4, 5, 8), 0)
    before = keys.clone()
    select = torch.index_select

    def recorded(states, *arguments, **options):
        copied.append(states.shape)
        return select(states, *arguments, **options)

    monkeypatch.setattr(torch, "index_select", recorded)
    cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
    assert copied == [(3, 4, 5, 8)] * 2
    assert torch.equal(cache.layers[0].keys, before[[2, 0, 0, 1]]) and torch.equal(keys, before)
    after, _ = cache.update(*torch.randn(2, 4, 4, 1, 8), 0)
    assert after.data_ptr() == cache.layers[0].keys.data_ptr() and torch.equal(after[:, :, :5], before[[2, 0, 0, 1]])


@pytest.mark.parametrize("variant", ["dense", "routed", "relative", "masked"])
def test_decoding_compiles_without_graph_breaks(variant, batch):
    captioner = tiny_captioner(variant)
    expected = captioner.generate(pixel_values=batch["pixel_values"], **GREEDY)
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager")
    compile_config._compile_all_devices = True  # transformers compiles decoding on GPUs only, unless told so
    compiled = captioner.generate(
        pixel_values=batch["pixel_values"], **GREEDY, cache_implementation="static", compile_config=compile_config
    )
    assert hasattr(captioner, "_compiled_call")
    assert torch.equal(compiled, expected)


@torch._inductor.config.patch(freezing=True)
def test_a_step_with_weights_as_constants_reads_the_cache_of_each_call(batch):
    """Inductor's `freezing`, which search.md shows, would take a static cache for one, too."""
    captioner = tiny_captioner()
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode="default")
    compile_config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compile_config}
    for images in (batch["pixel_values"], batch["pixel_values"].flip(0), -batch["pixel_values"]):
        expected = captioner.generate(pixel_values=images, **GREEDY)
        assert torch.equal(captioner.generate(pixel_values=images, **GREEDY, **static), expected)
    given = StaticCache(captioner.config, max_cache_len=captioner.config.num_image_tokens + 24)
    given_cache = {CACHE_NAME: given, "compile_config": compile_config}
    assert torch.equal(captioner.generate(pixel_values=images, **GREEDY, **given_cache), expected)
