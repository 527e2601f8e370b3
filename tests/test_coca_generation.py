"""CoCa's captions through the stock `generate()`: cached = uncached, batched = single, padding changes nothing."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import CompileConfig, DynamicCache

from models import coca_batch, pad_left, tiny_coca
from mome.captioning_mome import MomeCacheLayer
from mome.compatibility_mome import CACHE_NAME

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
masks = pytest.mark.parametrize("correct_cls_mask", [False, True])
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False, "num_return_sequences": 3},
    "beam sample": {"num_beams": 2, "do_sample": True},
}
strategies = pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES.keys())


def close(actual, expected, atol=1e-5):
    assert_close(actual, expected, atol=atol, rtol=0)


def favour_the_filler(captioner):
    """Makes captions write the filler now and then: what follows one is hidden, which a cache has to remember."""
    with torch.no_grad():
        captioner.lm_head.weight[0] = captioner.lm_head.weight[47] * 1.1  # the likeliest of all
    return captioner


@pytest.fixture
def batch():
    return coca_batch(tiny_coca().config)


@pytest.fixture
def prompts(batch):
    """Padded on the left, one with the filler as padding."""
    ids, mask = pad_left(batch["input_ids"], batch["attention_mask"]), pad_left(*[batch["attention_mask"]] * 2)
    ids[1] = ids[1].masked_fill(mask[1] == 0, 0)
    return {"pixel_values": batch["pixel_values"], "input_ids": ids, "attention_mask": mask}


def logits_of(captioner, **kwargs):
    outputs = captioner.generate(**kwargs, output_logits=True, return_dict_in_generate=True)
    return outputs.sequences, torch.stack(outputs.logits, dim=1)


@masks
def test_cached_decoding_equals_uncached(correct_cls_mask, batch):
    captioner = favour_the_filler(tiny_coca(correct_cls_mask=correct_cls_mask))
    options = {**GREEDY, "max_new_tokens": 16, "min_new_tokens": 16}
    cached = logits_of(captioner, pixel_values=batch["pixel_values"], **options)
    uncached = logits_of(captioner, pixel_values=batch["pixel_values"], **options, use_cache=False)
    assert (cached[0][:, 1:-1] == 0).any()
    close(cached[1], uncached[1])
    assert torch.equal(cached[0], uncached[0])
    close(cached[1], captioner(pixel_values=batch["pixel_values"], input_ids=cached[0][:, :-1]).logits)


@masks
def test_step_by_step_calls_equal_one_call(correct_cls_mask, batch):
    captioner = tiny_coca(correct_cls_mask=correct_cls_mask)
    ids, pixel_values = batch["input_ids"][::2], batch["pixel_values"][::2]
    whole = captioner(pixel_values=pixel_values, input_ids=ids).logits
    start = captioner(pixel_values=pixel_values, input_ids=ids[:, :3], use_cache=True)
    rest = [captioner(input_ids=ids[:, step : step + 2], cache=start.cache).logits for step in (3, 5)]
    close(torch.cat([start.logits, *rest], dim=1), whole)


@pytest.mark.parametrize("cached", [True, False])
def test_left_padding_never_changes_captions(cached, prompts, batch):
    captioner = favour_the_filler(tiny_coca())
    sequences, logits = logits_of(captioner, **prompts, **GREEDY, use_cache=cached)
    for row in range(4):
        prompt = batch["input_ids"][row : row + 1, : int(batch["attention_mask"][row].sum())]
        alone = logits_of(captioner, pixel_values=batch["pixel_values"][row : row + 1], input_ids=prompt, **GREEDY)
        assert torch.equal(sequences[row, -6:], alone[0][0, -6:])
        close(logits[row], alone[1][0])
    captioner.set_attn_implementation("eager")
    close(logits_of(captioner, **prompts, **GREEDY, use_cache=cached)[1], logits)


@torch.no_grad()
def test_logits_of_left_padded_rows_equal_those_of_unpadded_rows(batch):
    captioner, ids, pixel_values = tiny_coca(), batch["input_ids"][::2], batch["pixel_values"][::2]
    expected = captioner(pixel_values=pixel_values, input_ids=ids).logits
    mask = F.pad(torch.ones_like(ids), (9, 0))
    for padding in (captioner.config.pad_token_id, captioner.config.filler_token_id):
        padded = F.pad(ids, (9, 0), value=padding)
        for position_ids in (None, (mask.cumsum(dim=1) - 1).clamp(min=0)):
            given = {"pixel_values": pixel_values, "input_ids": padded, "attention_mask": mask}
            close(captioner(**given, position_ids=position_ids).logits[:, 9:], expected)


def test_the_image_is_encoded_once_for_all_beams_and_steps(batch):
    captioner, images, keys = tiny_coca(), [], []
    captioner.model.image_embedding.register_forward_hook(lambda module, args, _: images.append(len(args[0])))
    cross = captioner.decoder.layers[0].cross_attention
    cross.key_value.register_forward_hook(lambda module, args, _: keys.append(len(args[0])))
    sequences = captioner.generate(pixel_values=batch["pixel_values"], num_beams=3, num_return_sequences=2, **GREEDY)
    assert sequences.shape == (8, 7) and images == keys == [4]


@strategies
def test_every_strategy_gives_the_same_with_and_without_cache(options, batch):
    captioner, captions = favour_the_filler(tiny_coca()), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        given = {"pixel_values": batch["pixel_values"], "max_new_tokens": 12, "use_cache": use_cache}
        captions.append(captioner.generate(**given, **options))
    assert torch.equal(*captions)
    assert captions[0].shape[0] == 4 * options.get("num_return_sequences", 1)


def test_a_batch_equals_single_calls(batch):
    captioner = favour_the_filler(tiny_coca())
    for options in ({}, {"num_beams": 3}):
        together = captioner.generate(pixel_values=batch["pixel_values"], **GREEDY, **options)
        for row, image in enumerate(batch["pixel_values"]):
            assert torch.equal(captioner.generate(pixel_values=image[None], **GREEDY, **options)[0], together[row])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_every_cache_of_transformers_gives_the_same(options, prompts):
    captioner = favour_the_filler(tiny_coca())
    options = {**GREEDY, "max_new_tokens": 10, **options}
    expected = captioner.generate(**prompts, **options)
    caches = [{"cache_implementation": "static", "disable_compile": True}]
    caches += [{CACHE_NAME: cache} for cache in (DynamicCache(config=captioner.config), DynamicCache())]
    for cache in caches:
        assert torch.equal(captioner.generate(**prompts, **options, **cache), expected)


def test_a_static_cache_that_is_used_again_sees_the_new_image(batch):
    captioner, options = tiny_coca(), {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    for image in batch["pixel_values"]:
        given = {"pixel_values": image[None]}
        assert torch.equal(captioner.generate(**given, **options), captioner.generate(**given, **GREEDY))


def test_assisted_decoding_gives_the_greedy_caption(batch):
    captioner, assistant, seen = favour_the_filler(tiny_coca()), tiny_coca(seed=1), []
    assistant.model.image_embedding.register_forward_hook(lambda module, args, _: seen.append(args[0]))
    for row in range(2):
        inputs = {
            "pixel_values": batch["pixel_values"][row : row + 1],
            "input_ids": batch["input_ids"][row : row + 1, :4],
        }
        expected = captioner.generate(**inputs, **GREEDY)
        assert torch.equal(captioner.generate(**inputs, **GREEDY, assistant_model=assistant), expected)
        assert seen and torch.equal(seen[-1], inputs["pixel_values"])  # its drafts are of this image
        assert torch.equal(captioner.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2), expected)


@pytest.mark.parametrize("with_image", [True, False])
def test_generation_goes_on_from_a_cache(with_image, batch):
    captioner, inputs = tiny_coca(), {"pixel_values": batch["pixel_values"], "input_ids": batch["input_ids"][:, :3]}
    expected = captioner.generate(**inputs, **GREEDY)
    two = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    first = captioner.generate(**inputs, **two, return_dict_in_generate=True)
    image = {"pixel_values": batch["pixel_values"]} if with_image else {}
    given = {"input_ids": first.sequences, "cache": first[CACHE_NAME], **image}
    rest = captioner.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(rest, expected)


def test_a_prompt_may_end_in_eos_and_be_padded_on_the_right(batch):
    captioner, pixel_values = tiny_coca(), batch["pixel_values"][:2]
    prompts = torch.tensor([[1, 20, 21, 2], [1, 22, 2, 2]])
    together = captioner.generate(pixel_values=pixel_values, input_ids=prompts, **GREEDY)
    assert together[:, :4].tolist() == [[2, 1, 20, 21], [2, 2, 1, 22]] and together.shape == (2, 4 + 6)
    for row, words in enumerate(([1, 20, 21], [1, 22])):
        alone = captioner.generate(pixel_values=pixel_values[row : row + 1], input_ids=torch.tensor([words]), **GREEDY)
        assert torch.equal(alone[0, -6:], together[row, -6:])
    empty = captioner.generate(pixel_values=pixel_values, input_ids=torch.tensor([[2], [2]]), **GREEDY)
    assert torch.equal(empty, captioner.generate(pixel_values=pixel_values, **GREEDY))
    assert (empty[:, 0] == captioner.config.bos_token_id).all()


def test_positions_of_a_prompt_are_used(prompts):
    captioner, mask = favour_the_filler(tiny_coca()), prompts["attention_mask"]
    expected, logits = logits_of(captioner, **prompts, **GREEDY)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    embeds = captioner.get_input_embeddings()(prompts["input_ids"])
    for cached in (True, False):
        for given in (prompts, {**prompts, "input_ids": None, "inputs_embeds": embeds}):
            close(logits_of(captioner, **given, position_ids=positions, **GREEDY, use_cache=cached)[1], logits)
    ids, image = prompts["input_ids"][:1, :4], prompts["pixel_values"][:1]
    later = {"pixel_values": image, "input_ids": ids, "position_ids": torch.arange(3, 7)[None]}
    sequences, logits = logits_of(captioner, **later, **GREEDY)
    behind = torch.arange(3, 12)[None]
    close(captioner(pixel_values=image, input_ids=sequences[:, :-1], position_ids=behind).logits[:, 3:], logits)
    default = logits_of(captioner, pixel_values=image, input_ids=ids, **GREEDY)[1]
    assert (default[:, 0] - logits[:, 0]).abs().max() > 1e-3


def test_texts_packed_in_a_row_are_refused(batch):
    captioner, given = tiny_coca(), {name: batch[name][:1] for name in ("pixel_values", "input_ids")}
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    for call in (captioner, captioner.generate):
        with pytest.raises(ValueError, match="position_ids start again within a row"):
            call(**given, position_ids=packed)
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 3\), expected one for each token"):
        captioner.generate(**given, position_ids=packed[:, :3])
    with pytest.raises(ValueError, match="position_ids holds -1: the text starts at 0"):
        captioner(**given, position_ids=torch.arange(-1, 6)[None])
    with pytest.raises(ValueError, match="position_ids changes nothing in the text pass"):
        captioner.get_text_features(given["input_ids"], position_ids=packed)


@torch.no_grad()
@pytest.mark.parametrize("eos", [2, [2, 30]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_found_without_a_mask(side, eos, batch):
    """`[EOS]` is the padding, and the one that ends the text stays."""
    captioner, pixel_values = tiny_coca(eos_token_id=eos), batch["pixel_values"][:1]
    text = torch.tensor([[1, 20, 2, 21, 2]])
    padded = F.pad(text, (3, 0) if side == "left" else (0, 3), value=2)
    words = slice(3, 8) if side == "left" else slice(0, 5)
    close(captioner.get_text_features(padded).pooler_output, captioner.get_text_features(text).pooler_output)
    alone = captioner(pixel_values=pixel_values, input_ids=text).logits
    close(captioner(pixel_values=pixel_values, input_ids=padded).logits[:, words], alone)
    new = captioner.generate(pixel_values=pixel_values, input_ids=padded, **GREEDY)[:, -6:]
    assert torch.equal(captioner.generate(pixel_values=pixel_values, input_ids=text, **GREEDY)[:, -6:], new)


@pytest.mark.parametrize("where", ["config", "generation config", "argument"])
@pytest.mark.parametrize("options", [{}, {"rerank_weight": 0.5, "rerank_candidates": 3}], ids=["greedy", "rerank"])
def test_several_ids_may_end_a_caption(options, where, batch):
    captioner, image = tiny_coca(), {"pixel_values": batch["pixel_values"]}
    free = captioner.generate(**image, **GREEDY)[:, 1:]
    second = int(free[0, 2])  # what the first caption writes third now ends it
    if where == "config":
        captioner = tiny_coca(eos_token_id=[2, second])
        assert captioner.generation_config.eos_token_id == [2, second]
    elif where == "generation config":
        captioner.generation_config.eos_token_id = [2, second]
    else:
        options = {**options, "eos_token_id": [2, second]}
    captions = captioner.generate(**image, max_new_tokens=6, do_sample=False, **options)[:, 1:]
    if "rerank_weight" not in options:
        start = free[0].tolist().index(second)
        assert captions[0].tolist()[: start + 1] == free[0].tolist()[: start + 1]
    for caption in captions.tolist():
        ends = [place for place, token in enumerate(caption) if token in (2, second)]
        assert not ends or set(caption[ends[0] + 1 :]) <= {2}


def test_losses_of_a_part_count_by_their_share_of_the_labels(batch):
    captioner = tiny_coca()
    given = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    alone, number = captioner(**given), int((given["labels"][:, 1:] != -100).sum())
    for share in (1, 3):
        part = captioner(**given, num_items_in_batch=torch.tensor(share * number))
        for name in ("loss", "contrastive_loss", "caption_loss"):
            close(part[name], alone[name] / share)
    shifted = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    close(captioner(**given, shift_labels=shifted, num_items_in_batch=2 * number).loss, alone.loss / 2)
    with pytest.raises(ValueError, match="num_items_in_batch=0: all labels are -100"):
        captioner(**given, num_items_in_batch=0)
    assert captioner.model.accepts_loss_kwargs is False


def test_embeddings_of_a_prompt_give_the_caption_of_its_ids(batch):
    captioner, prompt = favour_the_filler(tiny_coca()), batch["input_ids"][:, :4]
    pixel_values = batch["pixel_values"]
    expected = captioner.generate(pixel_values=pixel_values, input_ids=prompt, **GREEDY)[:, -6:]
    embeds = captioner.get_input_embeddings()(prompt)
    assert torch.equal(captioner.generate(pixel_values=pixel_values, inputs_embeds=embeds, **GREEDY), expected)
    both = captioner.generate(pixel_values=pixel_values, input_ids=prompt, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(both[:, -6:], expected)


def test_lengths_end_with_the_position_table(batch):
    captioner, image = tiny_coca(), batch["pixel_values"][:1]
    captioner.generation_config.eos_token_id = None
    assert captioner.generate(pixel_values=image).shape == (1, 21)
    assert captioner.generate(pixel_values=image, max_length=9).shape == (1, 9)
    assert captioner.generate(pixel_values=image, max_new_tokens=500).shape == (1, 24)
    with pytest.raises(ValueError, match="24 tokens leaves no room"):
        captioner.generate(pixel_values=image, input_ids=torch.full((1, 24), 9))
    with pytest.raises(ValueError, match="4 images and 2 prompts"):
        captioner.generate(pixel_values=batch["pixel_values"], input_ids=torch.full((2, 3), 9))
    with pytest.raises(ValueError, match="captions are made of images"):
        captioner.generate(input_ids=torch.full((1, 3), 9))
    cache = DynamicCache()
    captioner(pixel_values=image, input_ids=torch.full((1, 23), 9), cache=cache)
    captioner(input_ids=torch.full((1, 1), 9), cache=cache)
    with pytest.raises(ValueError, match="25 tokens, max_position_embeddings is 24"):
        captioner(input_ids=torch.full((1, 1), 9), cache=cache)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_the_old_and_the_new_name_of_transformers(name, batch):
    captioner, ids, pixel_values = tiny_coca(), batch["input_ids"][::2], batch["pixel_values"][::2]
    whole = captioner(pixel_values=pixel_values, input_ids=ids).logits
    start = captioner(pixel_values=pixel_values, input_ids=ids[:, :3], use_cache=True)
    assert getattr(start, name) is start.cache is start[CACHE_NAME]
    close(captioner(input_ids=ids[:, 3:], **{name: start.cache}).logits, whole[:, 3:])
    with pytest.raises(ValueError, match="two names for the same"):
        captioner(input_ids=ids[:, 3:], cache=start.cache, past_key_values=start.cache)


@torch.no_grad()
def test_logits_to_keep_keeps_the_last_ones_or_those_of_positions(batch):
    captioner = tiny_coca()
    whole = captioner(**batch).logits
    for keep in (1, 3, 7):
        close(captioner(**batch, logits_to_keep=keep).logits, whole[:, -keep:])
    close(captioner(**batch, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


def test_a_cache_that_runs_out_of_room_changes_no_caption(batch, monkeypatch):
    captioner = favour_the_filler(tiny_coca())
    expected = logits_of(captioner, pixel_values=batch["pixel_values"], num_beams=3, **GREEDY)
    monkeypatch.setattr(MomeCacheLayer, "room", 2)
    actual = logits_of(captioner, pixel_values=batch["pixel_values"], num_beams=3, **GREEDY)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_captions_work_in_half_precision(dtype, prompts):
    captioner = tiny_coca().to(dtype)
    prompts = {**prompts, "pixel_values": prompts["pixel_values"].to(dtype)}
    for options in ({}, {"num_beams": 3, "rerank_weight": 0.5, "rerank_candidates": 3}):
        assert captioner.generate(**prompts, **GREEDY, **options).shape == (4, 13)
    assert captioner(**prompts).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------------ guidance


@torch.no_grad()
@pytest.mark.parametrize("prompted", [False, True])
def test_re_ranking_equals_scoring_every_candidate_by_hand(prompted, prompts):
    captioner = favour_the_filler(tiny_coca())
    given = prompts if prompted else {"pixel_values": prompts["pixel_values"]}
    options = {"max_new_tokens": 5, "num_beams": 4, "num_return_sequences": 4}
    candidates = captioner.generate(**given, **options)
    ranked = captioner.generate(
        **given, **options, rerank_weight=0.4, output_cosine=True, return_dict_in_generate=True
    )
    length = given["input_ids"].shape[1] if prompted else 1
    image_embeds = captioner.get_image_features(given["pixel_values"]).pooler_output
    scores, cosines = [], []
    for row, sequence in enumerate(candidates):
        mask = given["attention_mask"][row // 4] if prompted else torch.ones(1, dtype=torch.long)
        prompt, new = sequence[:length][mask.bool()], sequence[length:].tolist()
        words = new[: new.index(2)] if 2 in new else new
        text = torch.cat([prompt, torch.tensor([*words, 2])])[None]
        image = given["pixel_values"][row // 4, None]
        log_p = captioner(input_ids=text, pixel_values=image).logits.log_softmax(dim=-1)[0]
        count = len(words) + (2 in new)
        steps = range(len(prompt) - 1, len(prompt) - 1 + count)
        fluency = sum(log_p[step, text[0, step + 1]] for step in steps) / count
        cosine = (captioner.get_text_features(text).pooler_output * image_embeds[row // 4]).sum()
        scores.append(0.6 * fluency + 0.4 * captioner.logit_scale.exp() * cosine)
        cosines.append(cosine)
    scores, cosines = torch.stack(scores).view(4, 4), torch.stack(cosines).view(4, 4)
    order = scores.argsort(dim=1, descending=True)
    assert torch.equal(ranked.sequences.view(4, 4, -1), candidates.view(4, 4, -1)[torch.arange(4)[:, None], order])
    close(ranked.rerank_scores.view(4, 4), scores.gather(1, order), atol=1e-4)
    close(ranked.cosine.view(4, 4), cosines.gather(1, order))


@torch.no_grad()
def test_contrastive_guidance_equals_its_formula(batch):
    captioner, image = tiny_coca(), batch["pixel_values"][:1]
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    guided = captioner.generate(pixel_values=image, contrastive_weight=2.0, contrastive_top_k=4, **options)
    image_embeds = captioner.get_image_features(image).pooler_output
    for step, scores in enumerate(guided.scores):
        text = guided.sequences[:, : 1 + step]
        logits = captioner(input_ids=text, pixel_values=image).logits[0, -1]
        best = logits.topk(4).indices
        ends = [[] if token == 2 else [2] for token in best]
        texts = [torch.tensor([[*text[0].tolist(), int(token), *end]]) for token, end in zip(best, ends)]
        cosines = torch.cat([captioner.get_text_features(each).pooler_output @ image_embeds[0] for each in texts])
        logits[best] += 2 * (captioner.logit_scale.exp() * cosines).softmax(dim=0)
        close(scores[0], logits, atol=1e-4)


def test_guidance_by_a_caption_without_image_is_refused(batch):
    with pytest.raises(ValueError, match="guidance_scale=2.0"):
        tiny_coca().generate(pixel_values=batch["pixel_values"], guidance_scale=2.0)


def test_decoding_compiles_without_graph_breaks(batch):
    captioner = favour_the_filler(tiny_coca())
    expected = captioner.generate(pixel_values=batch["pixel_values"], **GREEDY)
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager")
    compile_config._compile_all_devices = True  # transformers compiles decoding on GPUs only, unless told so
    compiled = captioner.generate(
        pixel_values=batch["pixel_values"], **GREEDY, cache_implementation="static", compile_config=compile_config
    )
    assert hasattr(captioner, "_compiled_call")
    assert torch.equal(compiled, expected)
