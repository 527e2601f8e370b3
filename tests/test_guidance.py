"""Guided captions: each method equals its formula worked out by hand, and its neutral value changes nothing."""

import json

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, CompileConfig, GenerationConfig

from models import VARIANTS, pad_left, random_batch, tiny_captioner
from mome.captioning_mome import CaptionContext
from mome.guidance_mome import GUIDANCE_PRESETS, MomeGenerationConfig, guidance_options

every_variant = pytest.mark.parametrize("variant", VARIANTS)
some_variants = pytest.mark.parametrize("variant", ["dense", "routed", "relative", "masked"])
GREEDY = {"max_new_tokens": 6, "do_sample": False}
BEAMS = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
EOS, PAD = 2, 0
SETTINGS = {
    "rerank": {"rerank_weight": 0.5, "rerank_candidates": 4},
    "classifier-free": {"guidance_scale": 2.0},
    "contrastive": {"contrastive_weight": 3.0, "contrastive_top_k": 5},
    "all": {
        "rerank_weight": 0.3,
        "rerank_candidates": 4,
        "guidance_scale": 1.5,
        "contrastive_weight": 2.0,
        "contrastive_top_k": 4,
    },
}
every_method = pytest.mark.parametrize("method", SETTINGS)


def close(actual, expected, atol=1e-5):
    assert_close(actual, expected, atol=atol, rtol=1e-5)


def captioner_of(variant="dense", **overrides):
    """A tiny captioner that ends its captions now and then."""
    captioner = tiny_captioner(variant, **overrides)
    with torch.no_grad():
        captioner.lm_head.decoder.bias[EOS] += 3.0
    return captioner


def prompted_batch(captioner, size=4):
    """Images and left-padded prompts of 5 and 3 tokens in turn."""
    batch = random_batch(captioner.config, size=size, tokens=5)
    mask = batch["attention_mask"]
    return {
        "pixel_values": batch["pixel_values"],
        "input_ids": pad_left(batch["input_ids"], mask),
        "attention_mask": pad_left(mask, mask),
    }


def words_of(row: torch.Tensor, mask: torch.Tensor | None = None) -> list[int]:
    """The text of a row of `generate()`: without padding before it, up to the first `[EOS]` behind the prompt."""
    start = 0 if mask is None else int((mask == 0).sum())
    words = row[start:].tolist()
    return words[: words.index(EOS) + 1] if EOS in words else words


def text_embedding(captioner, words: list[int]) -> torch.Tensor:
    words = words if words[-1] == EOS else [*words, EOS]
    return captioner.get_text_features(torch.tensor([words])).pooler_output[0]


def log_probability(captioner, image: torch.Tensor, words: list[int], prompt: int) -> float:
    """log p of the words behind the prompt, one call without a cache for each word."""
    total = 0.0
    for end in range(prompt, len(words)):
        logits = captioner(
            pixel_values=image[None], input_ids=torch.tensor([words[:end]]), image_tokens_in_input=False
        ).logits[0, -1]
        total += float(logits.log_softmax(-1)[words[end]])
    return total


# ------------------------------------------------------------------------------------------------------ re-ranking


@some_variants
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("options", [{"num_beams": 4}, {"do_sample": True}], ids=["beams", "samples"])
@torch.no_grad()
def test_re_ranking_equals_scoring_every_candidate_by_hand(variant, prompted, options):
    captioner = captioner_of(variant)
    inputs = prompted_batch(captioner)
    mask = inputs["attention_mask"] if prompted else torch.ones(4, 1)
    if not prompted:
        inputs = {"pixel_values": inputs["pixel_values"]}
    options = {"max_new_tokens": 6, "length_penalty": 0.7, **options}
    torch.manual_seed(0)
    candidates = captioner.generate(**inputs, **options, num_return_sequences=4)
    torch.manual_seed(0)
    ranked = captioner.generate(
        **inputs,
        **options,
        num_return_sequences=2,
        rerank_candidates=4,
        rerank_weight=0.4,
        rerank_scale=5.0,
        return_dict_in_generate=True,
        output_cosine=True,
    )
    assert ranked.sequences.shape == (8, candidates.shape[1])
    assert len({len(words_of(row[mask.shape[1] :])) for row in candidates}) > 1  # of unequal length
    image_embeds = captioner.get_image_features(inputs["pixel_values"]).pooler_output
    for image in range(4):
        scores, cosines = [], []
        for row in candidates[4 * image : 4 * image + 4]:
            words, prompt = words_of(row, mask[image]), int(mask[image].sum())
            fluency = log_probability(captioner, inputs["pixel_values"][image], words, prompt)
            cosines.append(float(text_embedding(captioner, words) @ image_embeds[image]))
            scores.append(0.6 * fluency / (len(words) - prompt) ** 0.7 + 0.4 * 5.0 * cosines[-1])
        best = sorted(range(4), key=lambda each: -scores[each])[:2]
        chosen = slice(2 * image, 2 * image + 2)
        assert ranked.candidate_indices[chosen].tolist() == [4 * image + each for each in best]
        assert torch.equal(ranked.sequences[chosen], candidates[4 * image : 4 * image + 4][best])
        close(ranked.rerank_scores[chosen], torch.tensor([scores[each] for each in best]))
        close(ranked.cosine[chosen], torch.tensor([cosines[each] for each in best]))


def test_the_scale_of_re_ranking_is_the_inverse_temperature_unless_given():
    captioner = captioner_of()
    inputs = {
        "pixel_values": random_batch(captioner.config)["pixel_values"],
        **GREEDY,
        "return_dict_in_generate": True,
    }
    options = {"rerank_weight": 0.5, "rerank_candidates": 3}
    expected = captioner.generate(**inputs, **options, rerank_scale=captioner.model.logit_scale.exp().item())
    close(captioner.generate(**inputs, **options).rerank_scores, expected.rerank_scores)
    other = captioner.generate(**inputs, **options, rerank_scale=1.0)
    assert (other.rerank_scores - expected.rerank_scores).abs().max() > 0.1


@torch.no_grad()
def test_what_comes_with_a_re_ranked_caption_is_its_own():
    captioner = captioner_of()
    pixel_values = random_batch(captioner.config)["pixel_values"]
    for options in ({"num_beams": 4, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 3}):
        outputs = captioner.generate(
            pixel_values=pixel_values,
            max_new_tokens=6,
            rerank_weight=0.9,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **options,
        )
        rows = torch.arange(9) if outputs.get("beam_indices") is None else outputs.beam_indices[:, 0]
        first = torch.stack([outputs.logits[0][row] for row in rows])
        whole = captioner(pixel_values=pixel_values, input_ids=torch.ones(3, 1).long()).logits[:, -1]
        close(first, whole.repeat_interleave(3, dim=0))
        if "sequences_scores" in outputs:
            scores = captioner.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)
            lengths = (outputs.beam_indices >= 0).sum(dim=1)
            close(scores.sum(dim=1) / lengths, outputs.sequences_scores)
        else:
            for row in range(9):
                step = outputs.logits[1][row]
                words = outputs.sequences[row : row + 1, :2]
                again = captioner(
                    pixel_values=pixel_values[row // 3, None], input_ids=words, image_tokens_in_input=False
                )
                close(step, again.logits[0, -1])


# ------------------------------------------------------------------------------------------ classifier-free guidance


def guided_by_hand(captioner, image, words: list[int], scale: float) -> torch.Tensor:
    """log p(y) + γ [log p(y|x) − log p(y)] of the next word."""
    ids = torch.tensor([words])
    free = captioner(input_ids=ids).logits[0, -1].log_softmax(-1)
    conditional = captioner(pixel_values=image[None], input_ids=ids, image_tokens_in_input=False).logits[0, -1]
    return free + scale * (conditional.log_softmax(-1) - free)


@every_variant
@torch.no_grad()
def test_classifier_free_guidance_equals_its_formula_at_every_step(variant):
    captioner = captioner_of(variant)
    inputs = prompted_batch(captioner)
    outputs = captioner.generate(
        **inputs, **GREEDY, guidance_scale=2.0, return_dict_in_generate=True, output_scores=True
    )
    unguided = captioner.generate(**inputs, **GREEDY)
    assert not torch.equal(outputs.sequences, unguided)
    for image in range(4):
        words, prompt = words_of(outputs.sequences[image], inputs["attention_mask"][image]), 5 - 2 * (image % 2)
        for step in range(prompt, len(words)):
            expected = guided_by_hand(captioner, inputs["pixel_values"][image], words[:step], 2.0)
            close(outputs.scores[step - prompt][image], expected, atol=1e-4)
            assert int(expected.argmax()) == words[step]


@every_variant
@torch.no_grad()
def test_the_score_of_a_guided_beam_is_the_sum_of_the_formula(variant):
    captioner = captioner_of(variant)
    inputs = prompted_batch(captioner)
    outputs = captioner.generate(
        **inputs,
        **BEAMS,
        num_return_sequences=3,
        length_penalty=0.0,
        guidance_scale=2.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row in range(12):
        image, prompt = row // 3, 5 - 2 * (row // 3 % 2)
        words = words_of(outputs.sequences[row], inputs["attention_mask"][image])
        pixels = inputs["pixel_values"][image]
        total = sum(
            float(guided_by_hand(captioner, pixels, words[:step], 2.0)[words[step]])
            for step in range(prompt, len(words))
        )
        assert abs(total - float(outputs.sequences_scores[row])) < 2e-4


@torch.no_grad()
def test_guided_beams_that_cover_everything_find_the_best_caption():
    """As many beams as words: of two words, beam search then is exhaustive."""
    captioner = captioner_of(vocab_size=12)
    captioner.generation_config.eos_token_id = None
    image = random_batch(captioner.config)["pixel_values"][:1]
    found = captioner.generate(
        pixel_values=image,
        num_beams=12,
        max_new_tokens=2,
        guidance_scale=2.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    first = guided_by_hand(captioner, image[0], [1], 2.0)
    both = torch.stack([first[word] + guided_by_hand(captioner, image[0], [1, word], 2.0) for word in range(12)])
    best = int(both.argmax())
    assert found.sequences[0].tolist() == [1, best // 12, best % 12]
    close(found.sequences_scores[0] * 2, both.max(), atol=1e-4)


@every_variant
@torch.no_grad()
def test_the_image_free_model_is_the_caption_pass_with_its_image_hidden(variant, monkeypatch):
    captioner = captioner_of(variant)
    batch, images = random_batch(captioner.config), captioner.config.num_image_tokens
    free = captioner(input_ids=batch["input_ids"]).logits
    visible = captioner(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"]).logits
    make = CaptionContext.causal_mask

    def hide_the_image(context, like, materialise):
        mask = make(context, like, True)
        hidden = mask.clone()
        hidden[..., :images] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return hidden

    monkeypatch.setattr(CaptionContext, "causal_mask", hide_the_image)
    hidden = captioner(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"]).logits
    close(hidden, free)
    assert (visible - free).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------ stepwise contrastive


@some_variants
@pytest.mark.parametrize("options", [GREEDY, {**GREEDY, "min_new_tokens": 4}], ids=["free", "without early EOS"])
@torch.no_grad()
def test_contrastive_guidance_equals_its_formula_at_every_step(variant, options):
    captioner = captioner_of(variant)
    inputs = prompted_batch(captioner)
    k, weight = 5, 3.0
    outputs = captioner.generate(
        **inputs,
        **options,
        contrastive_weight=weight,
        contrastive_top_k=k,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert not torch.equal(outputs.sequences, captioner.generate(**inputs, **options))
    image_embeds = captioner.get_image_features(inputs["pixel_values"]).pooler_output
    for image in range(4):
        words, prompt = words_of(outputs.sequences[image], inputs["attention_mask"][image]), 5 - 2 * (image % 2)
        for step in range(prompt, len(words)):
            scores = outputs.logits[step - prompt][image].clone()
            if step - prompt < options.get("min_new_tokens", 0):
                scores[EOS] = -torch.inf
            tokens = scores.topk(k).indices.tolist()
            texts = torch.stack([text_embedding(captioner, [*words[:step], token]) for token in tokens])
            cosines = texts @ image_embeds[image]
            scores[tokens] += weight * (captioner.model.logit_scale.exp() * cosines).softmax(-1)
            close(outputs.scores[step - prompt][image], scores, atol=1e-4)
            assert int(scores.argmax()) == words[step] and words[step] in tokens


# -------------------------------------------------------------------------------------------------------- all methods


@every_variant
@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_neutral_values_change_nothing(variant, options):
    captioner = captioner_of(variant)
    inputs = prompted_batch(captioner)
    expected = captioner.generate(**inputs, **options)
    assert torch.equal(captioner.generate(**inputs, **options, guidance_scale=1.0), expected)
    assert torch.equal(captioner.generate(**inputs, **options, contrastive_weight=0.0), expected)
    assert torch.equal(captioner.generate(**inputs, **options, rerank_weight=0.0, rerank_candidates=4), expected)


@every_method
@pytest.mark.parametrize("variant", ["dense", "routed", "masked_relative", "vlmo"])
def test_a_batch_of_eight_equals_eight_single_calls(method, variant):
    captioner = captioner_of(variant)
    inputs = prompted_batch(captioner, size=8)
    settings = {**SETTINGS[method], "return_dict_in_generate": True, "output_cosine": True}
    for options in (GREEDY, {**BEAMS, "num_beams": 4}):
        together = captioner.generate(**inputs, **options, **settings)
        for row in range(8):
            mask = inputs["attention_mask"][row].bool()
            alone = captioner.generate(
                pixel_values=inputs["pixel_values"][row : row + 1],
                input_ids=inputs["input_ids"][row : row + 1, mask],
                **options,
                **settings,
            )
            assert words_of(alone.sequences[0]) == words_of(together.sequences[row], inputs["attention_mask"][row])
            close(alone.cosine[0], together.cosine[row])


@every_method
@pytest.mark.parametrize("options", [GREEDY, BEAMS, {"do_sample": True, "max_new_tokens": 6}])
def test_the_image_is_encoded_once(method, options):
    captioner, images = captioner_of(), []
    inputs = prompted_batch(captioner)
    captioner.model.image_embedding.register_forward_hook(lambda module, args, _: images.append(len(args[0])))
    options = {**options, "num_beams": max(4, options.get("num_beams", 1))} if "num_beams" in options else options
    for use_cache in (True, False):
        if not use_cache and method == "classifier-free":
            continue  # as without guidance, every step without a cache starts from the image
        images.clear()
        captioner.generate(**inputs, **options, **SETTINGS[method], use_cache=use_cache)
        assert images == [4]


@every_method
@pytest.mark.parametrize("variant", ["dense", "masked"])
def test_guided_captions_are_the_same_with_and_without_cache(method, variant):
    captioner = captioner_of(variant)
    inputs = prompted_batch(captioner)
    captions = [
        captioner.generate(**inputs, **{**BEAMS, "num_beams": 4}, **SETTINGS[method], use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*captions)


@every_method
def test_guided_captions_are_the_same_with_a_static_cache_and_compiled(method):
    captioner = captioner_of()
    inputs = prompted_batch(captioner)
    expected = captioner.generate(**inputs, **GREEDY, **SETTINGS[method])
    static = {**GREEDY, **SETTINGS[method], "cache_implementation": "static"}
    assert torch.equal(captioner.generate(**inputs, **static, disable_compile=True), expected)
    if method in ("rerank", "all"):
        return  # transformers does not compile beam search
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager")
    compile_config._compile_all_devices = True
    assert torch.equal(captioner.generate(**inputs, **static, compile_config=compile_config), expected)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_guidance_works_in_half_precision(method, dtype):
    captioner = captioner_of().to(dtype)
    outputs = captioner.generate(
        **prompted_batch(captioner), **GREEDY, **SETTINGS[method], return_dict_in_generate=True, output_cosine=True
    )
    assert outputs.cosine.dtype == torch.float32 and outputs.cosine.abs().max() <= 1.01
    assert outputs.sequences.shape[0] == 4


@every_method
def test_guidance_works_where_image_tokens_are_in_the_prompt_already(method):
    captioner = captioner_of()
    inputs = prompted_batch(captioner)
    images = captioner.config.num_image_tokens
    expected = captioner.generate(**inputs, **GREEDY, **SETTINGS[method])
    right_padded = random_batch(captioner.config, size=4, tokens=5)
    placed = F.pad(right_padded["input_ids"], (images, 0), value=captioner.config.image_token_id)
    mask = F.pad(right_padded["attention_mask"], (images, 0), value=1)
    placed, mask = pad_left(placed, mask), pad_left(mask, mask)
    actual = captioner.generate(
        pixel_values=inputs["pixel_values"], input_ids=placed, attention_mask=mask, **GREEDY, **SETTINGS[method]
    )
    assert torch.equal(actual[:, placed.shape[1] :], expected[:, 5:])


def test_prompt_lookup_decoding_gives_the_guided_caption():
    captioner = captioner_of()
    inputs = {key: value[:1] for key, value in prompted_batch(captioner).items()}
    for method in ("classifier-free", "contrastive"):
        expected = captioner.generate(**inputs, **GREEDY, **SETTINGS[method])
        actual = captioner.generate(**inputs, **GREEDY, **SETTINGS[method], prompt_lookup_num_tokens=2)
        assert torch.equal(actual, expected)


@every_method
def test_a_caption_that_fills_the_position_table_is_guided_to_its_end(method):
    captioner = captioner_of(max_position_embeddings=8)
    captioner.generation_config.eos_token_id = None
    pixel_values = random_batch(captioner.config)["pixel_values"]
    captions = captioner.generate(pixel_values=pixel_values, max_new_tokens=50, **SETTINGS[method])
    assert captions.shape == (3, 8)


def test_a_user_s_logits_processor_comes_after_guidance():
    captioner = captioner_of()
    pixel_values = random_batch(captioner.config)["pixel_values"]
    unguided = captioner.generate(pixel_values=pixel_values, **GREEDY, guidance_scale=2.0)
    word = int(unguided[0, 1])

    def forbid(input_ids, scores):
        return scores.index_fill(1, torch.tensor([word]), -torch.inf)

    guided = captioner.generate(pixel_values=pixel_values, **GREEDY, guidance_scale=2.0, logits_processor=[forbid])
    assert word not in guided[0] and not torch.equal(guided, unguided)


# ------------------------------------------------------------------------------------------------- settings and errors


def test_a_checkpoint_carries_its_guidance(tmp_path):
    captioner = captioner_of()
    assert type(captioner.generation_config) is MomeGenerationConfig
    pixel_values = random_batch(captioner.config)["pixel_values"]
    captioner.save_pretrained(tmp_path / "plain")
    assert "rerank" not in (tmp_path / "plain" / "generation_config.json").read_text()
    unguided = captioner.generate(pixel_values=pixel_values, **GREEDY)
    captioner.generation_config.update(**SETTINGS["all"])
    guided = captioner.generate(pixel_values=pixel_values, **GREEDY)
    assert guided.shape != unguided.shape or not torch.equal(guided, unguided)
    captioner.save_pretrained(tmp_path / "guided")
    saved = json.loads((tmp_path / "guided" / "generation_config.json").read_text())
    assert saved.items() >= SETTINGS["all"].items()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "guided")
    assert type(loaded.generation_config) is MomeGenerationConfig
    assert torch.equal(loaded.generate(pixel_values=pixel_values, **GREEDY), guided)
    for options in ({"generation_config": GenerationConfig(**GREEDY)}, GREEDY):
        assert torch.equal(loaded.generate(pixel_values=pixel_values, **options), guided)
    off = {**GREEDY, **GUIDANCE_PRESETS["none"]}
    assert torch.equal(loaded.generate(pixel_values=pixel_values, **off), unguided)
    config = MomeGenerationConfig(**off)
    assert torch.equal(loaded.generate(pixel_values=pixel_values, generation_config=config), unguided)


def test_an_asked_for_length_wins_over_the_checkpoint_s():
    captioner = captioner_of()
    captioner.generation_config.update(max_new_tokens=9)
    captioner.generation_config.eos_token_id = None
    image = random_batch(captioner.config)["pixel_values"][:1]
    assert captioner.generate(pixel_values=image).shape == (1, 10)
    assert captioner.generate(pixel_values=image, max_length=5).shape == (1, 5)
    assert captioner.generate(pixel_values=image, generation_config=GenerationConfig(max_length=5)).shape == (1, 5)
    assert captioner.generate(pixel_values=image, max_new_tokens=5).shape == (1, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0 must be a number of at least 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"rerank_weight": 1.5}, "rerank_weight=1.5 must be a number from 0 to 1"),
        ({"rerank_weight": "high"}, "rerank_weight='high'"),
        ({"contrastive_top_k": 0}, "contrastive_top_k=0 must be an integer of at least 1"),
        ({"rerank_candidates": 2.5}, "rerank_candidates=2.5"),
        ({"output_cosine": "yes"}, "output_cosine='yes'"),
    ],
)
def test_a_value_that_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message) as error:
        MomeGenerationConfig(**options)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        captioner_of().generate(torch.ones(1, 1).long(), **options)


def test_guidance_without_what_it_needs_is_refused():
    captioner = captioner_of()
    batch = random_batch(captioner.config)
    pixel_values = batch["pixel_values"]
    for options in ({"rerank_weight": 0.5, "num_beams": 2}, {"contrastive_weight": 1.0}, {"output_cosine": True}):
        with pytest.raises(ValueError, match="pass pixel_values"):
            captioner.generate(batch["input_ids"], **options)
    with pytest.raises(ValueError, match="rerank_candidates=2 is less than num_return_sequences=3"):
        captioner.generate(pixel_values=pixel_values, rerank_weight=0.5, rerank_candidates=2, num_return_sequences=3)
    with pytest.raises(ValueError, match="num_beams=2 gives no rerank_candidates=4"):
        captioner.generate(pixel_values=pixel_values, rerank_weight=0.5, rerank_candidates=4, num_beams=2)
    embeds = captioner.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="pass input_ids"):
        captioner.generate(pixel_values=pixel_values, inputs_embeds=embeds, guidance_scale=2.0)
    with pytest.raises(ValueError, match="negative_prompt_ids has no use here"):
        captioner.generate(pixel_values=pixel_values, guidance_scale=2.0, negative_prompt_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="rerank_wieght"):
        captioner.generate(pixel_values=pixel_values, rerank_wieght=0.5)


def test_without_an_image_classifier_free_guidance_is_the_text_itself():
    captioner = captioner_of()
    ids = random_batch(captioner.config)["input_ids"][:1]
    assert torch.equal(captioner.generate(ids, **GREEDY, guidance_scale=3.0), captioner.generate(ids, **GREEDY))


def test_guidance_has_names_and_fields():
    assert guidance_options(None) == {}
    assert guidance_options("rerank") == GUIDANCE_PRESETS["rerank"]
    assert guidance_options(["classifier-free", "rerank"]) == {
        **GUIDANCE_PRESETS["classifier-free"],
        **GUIDANCE_PRESETS["rerank"],
    }
    assert guidance_options({"contrastive_top_k": 3}) == {"contrastive_top_k": 3}
    with pytest.raises(ValueError, match="unknown guidance 'rerang': did you mean 'rerank'"):
        guidance_options("rerang")
    with pytest.raises(ValueError, match="unknown field of guidance 'rerank_wieght': did you mean 'rerank_weight'"):
        guidance_options({"rerank_wieght": 1})
    with pytest.raises(ValueError, match="rerank_weight=2"):
        guidance_options({"rerank_weight": 2})
