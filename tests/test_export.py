"""Exported graphs give what the model gives, at any batch and length, with operators that everybody knows."""

import importlib.util

import pytest
import torch
from test_coca_checkpoints import GOLDEN, write_upstream
from test_coca_generation import favour_the_filler
from torch.export import Dim
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, SiglipConfig

from models import coca_batch, pad_left, random_batch, tiny_captioner, tiny_coca
from mome.convert.__main__ import main as convert
from mome.export.modules import CaptionStep, CocaCaptionStep, CocaImageTower, ImageTower, TextTower
from mome.onnx_embedder import greedy_ids, open_session
from upstream import golden, under

SIZES, LENGTHS = (1, 3, 32), (2, 3, 9, 24)
ANY = Dim.DYNAMIC
DENSE, ROUTED, HALF = ("dense", torch.float32), ("routed", torch.float32), ("routed", torch.bfloat16)
RELATIVE, MASKED = ("relative", torch.float32), ("masked_relative", torch.float32)
SIGLIP = ("siglip", torch.float32)


def of_kinds(*kinds):
    return pytest.mark.parametrize("variant, dtype", kinds, ids=[f"{name} {dtype}" for name, dtype in kinds])


needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)


def close(actual, expected):
    atol = 1e-5 if expected.dtype == torch.float32 else 0.05
    assert_close(actual, expected, atol=atol, rtol=0)


def batches(config, dtype=torch.float32):
    """Batches of every size and length; rows 1, 3, … end in two tokens of padding."""
    for size in SIZES:
        for length in LENGTHS:
            batch = random_batch(config, size=size, tokens=max(length, 4), seed=length)
            batch = {name: each[:, :length] if each.ndim == 2 else each.to(dtype) for name, each in batch.items()}
            yield batch


def operators(program) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@torch.no_grad()
@of_kinds(DENSE, ROUTED, HALF, RELATIVE, SIGLIP)
def test_towers_give_the_same_at_any_batch_and_length(variant, dtype):
    model = tiny_captioner(variant).model.to(dtype)
    image, text = (tower(model).to_program().module() for tower in (ImageTower, TextTower))
    for batch in batches(model.config, dtype):
        pixel_values = batch.pop("pixel_values")
        close(image(pixel_values), model.get_image_features(pixel_values).pooler_output)
        close(text(*batch.values()), model.get_text_features(**batch).pooler_output)


@torch.no_grad()
@of_kinds(DENSE, HALF)
def test_the_joint_forward_gives_the_same_for_any_number_of_images_and_texts(variant, dtype):
    model = tiny_captioner(variant).model.to(dtype)
    sample = random_batch(model.config, size=3) | {"pixel_values": random_batch(model.config, size=5)["pixel_values"]}
    sample["pixel_values"] = sample["pixel_values"].to(dtype)
    shapes = {"pixel_values": {0: ANY}, "input_ids": {0: ANY, 1: ANY}, "attention_mask": {0: ANY, 1: ANY}}
    program = torch.export.export(model, (), sample, dynamic_shapes=shapes).module()
    for batch in batches(model.config, dtype):
        for images in (1, 4):
            given = batch | {"pixel_values": random_batch(model.config, size=images)["pixel_values"].to(dtype)}
            actual, expected = program(**given), model(**given)
            for name in ("image_embeds", "text_embeds"):
                close(actual[name], expected[name])
            assert_close(actual.logits_per_image, expected.logits_per_image, atol=0.5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant, placed", [("dense", True), ("routed", False), ("masked_relative", True)])
def test_captions_are_scored_the_same_at_any_batch_and_length(variant, placed):
    captioner = tiny_captioner(variant)
    images, config = captioner.config.num_image_tokens, captioner.config

    def given(batch):
        if placed:
            ids = F.pad(batch["input_ids"], (images, 0), value=config.image_token_id)
            batch |= {"input_ids": ids, "attention_mask": F.pad(batch["attention_mask"], (images, 0), value=1)}
        return batch | {"image_tokens_in_input": placed, "use_cache": False}

    shapes = {"pixel_values": {0: ANY}, "input_ids": {0: ANY, 1: ANY}, "attention_mask": {0: ANY, 1: ANY}}
    sample = given(random_batch(config, size=3))
    shapes |= {"image_tokens_in_input": None, "use_cache": None}
    program = torch.export.export(captioner, (), sample, dynamic_shapes=shapes).module()
    for batch in batches(config):
        batch = given(batch)
        close(program(**batch).logits, captioner(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "all_experts", "batched_mm", "grouped_mm"])
def test_a_graph_of_experts_has_operators_that_everybody_knows(implementation):
    model = tiny_captioner("routed").model
    model.set_experts_implementation(implementation)
    program = ImageTower(model).to_program()
    names = operators(program)
    assert "aten.topk.default" in names and not {name for name in names if name.startswith(("mome", "transformers"))}
    pixel_values = random_batch(model.config, size=5)["pixel_values"]
    close(program.module()(pixel_values), model.get_image_features(pixel_values).pooler_output)


# ----------------------------------------------------------------------------------------------------- captions


def left_padded(config, dtype=torch.float32, size: int = 3) -> dict[str, torch.Tensor]:
    """Prompts of one to seven tokens, the first of them `[BOS]` alone."""
    batch = random_batch(config, size=size)
    mask = batch["attention_mask"].clone()
    mask[0, 1:] = 0
    return {
        "pixel_values": batch["pixel_values"].to(dtype),
        "input_ids": pad_left(batch["input_ids"], mask).masked_fill(pad_left(mask, mask) == 0, config.pad_token_id),
        "attention_mask": pad_left(mask, mask),
    }


def greedy(image_tower, caption_step, batch: dict, image_tokens: int, steps: int) -> tuple[torch.Tensor, list]:
    """Captions by the two graphs alone: (batch, steps) ids, and the logits of each step."""
    _, cache = image_tower(batch["pixel_values"])
    ids, mask = batch["input_ids"], F.pad(batch["attention_mask"], (image_tokens, 0), value=1)
    chosen, all_logits = [], []
    for _ in range(steps):
        logits, cache = caption_step(ids, mask, tuple(tuple(pair) for pair in cache))
        ids = logits.argmax(dim=-1)
        mask = F.pad(mask, (0, 1), value=1)
        chosen.append(ids)
        all_logits.append(logits[:, 0])
    return torch.cat(chosen, dim=1), all_logits


@torch.no_grad()
@of_kinds(DENSE, HALF, MASKED, SIGLIP, ("unshared", torch.float32))
def test_an_exported_step_decodes_as_generate_does(variant, dtype):
    captioner = tiny_captioner(variant).to(dtype)
    captioner.generation_config.eos_token_id = 98
    images, tower = captioner.config.num_image_tokens, ImageTower(captioner.model, key_values=True)
    image, step = tower.to_program().module(), CaptionStep(captioner).to_program().module()
    for size in SIZES:
        batch = left_padded(captioner.config, dtype, size)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        expected = captioner.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
        chosen, logits = greedy(image, step, batch, images, 6)
        close(logits[0], expected.logits[0].to(dtype))
        if dtype == torch.float32:  # in half precision two tokens may be as likely
            for each, other in zip(logits, expected.logits):
                close(each, other)
            assert torch.equal(chosen, expected.sequences[:, -6:])
    # and it takes several tokens behind a cache
    whole_mask = F.pad(batch["attention_mask"], (images, 0), value=1)
    for cuts in ((7,), (1, 7), (3, 5, 7), (6, 7)):
        (_, cache), past = tower(batch["pixel_values"]), 0
        for end in cuts:
            logits, cache = step(batch["input_ids"][:, past:end], whole_mask[:, : images + end], cache)
            cache, past = tuple(tuple(pair) for pair in cache), end
        close(logits, captioner(**batch, logits_to_keep=1).logits)


@pytest.mark.parametrize("variant", ["dense", "masked_relative"])
def test_a_step_of_the_models_own_cache_is_exported(variant):
    """Not through `CaptionStep`: whoever wraps a captioner and makes its cache inside."""
    captioner = tiny_captioner(variant)
    batch = random_batch(captioner.config)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.captioner = captioner

        def forward(self, pixel_values, input_ids):
            first = self.captioner(pixel_values=pixel_values, input_ids=input_ids, use_cache=True)
            following = first.logits[:, -1:].argmax(dim=-1)
            return self.captioner(input_ids=following, cache=first.cache, use_cache=True).logits

    given = {name: batch[name] for name in ("pixel_values", "input_ids")}
    shapes = {"pixel_values": {0: ANY}, "input_ids": {0: ANY, 1: ANY}}
    program = torch.export.export(Twice(), (), given, dynamic_shapes=shapes).module()
    for size, length in ((1, 2), (5, 11)):
        given = {name: random_batch(captioner.config, size, length)[name] for name in ("pixel_values", "input_ids")}
        close(program(**given), Twice()(**given))


@pytest.mark.parametrize("variant", ["relative", "masked_relative"])
def test_a_prompt_of_bos_alone_among_longer_ones_is_scored_as_alone(variant):
    captioner = tiny_captioner(variant)
    batch = left_padded(captioner.config)
    logits = captioner(**batch, logits_to_keep=1).logits[:1]
    alone = {"pixel_values": batch["pixel_values"][:1], "input_ids": batch["input_ids"][:1, -1:]}
    close(logits, captioner(**alone, logits_to_keep=1).logits)


# --------------------------------------------------------------------------------------------------------- ONNX


def session(module, path):
    """The module as ONNX Runtime runs it: tensors in and out, flat."""
    import onnxruntime

    module.to_onnx().save(path)
    runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert tuple(each.name for each in runtime.get_inputs()) == module.input_names
    assert tuple(each.name for each in runtime.get_outputs()) == module.output_names

    def run(*inputs):
        leaves = torch.utils._pytree.tree_leaves(inputs)
        outputs = runtime.run(None, {name: each.numpy() for name, each in zip(module.input_names, leaves)})
        return [torch.from_numpy(each) for each in outputs]

    return run


def in_pairs(states: list) -> tuple:
    return tuple(zip(states[::2], states[1::2]))


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("variant", ["dense", "routed", "siglip"])
def test_onnx_towers_give_the_same(variant, tmp_path):
    model = tiny_captioner(variant).model
    image, text = (session(tower(model), tmp_path / f"{tower.__name__}.onnx") for tower in (ImageTower, TextTower))
    for batch in batches(model.config):
        close(image(batch["pixel_values"])[0], model.get_image_features(batch["pixel_values"]).pooler_output)
        embeds = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        close(text(batch["input_ids"], batch["attention_mask"])[0], embeds)


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("variant", ["dense", "routed", "masked_relative"])
def test_an_onnx_step_decodes_as_generate_does(variant, tmp_path):
    captioner = tiny_captioner(variant)
    captioner.generation_config.eos_token_id = 98
    tower = session(ImageTower(captioner.model, key_values=True), tmp_path / "image.onnx")
    step = session(CaptionStep(captioner), tmp_path / "step.onnx")

    def image(pixel_values):
        embeds, *states = tower(pixel_values)
        close(embeds, captioner.get_image_features(pixel_values).pooler_output)
        return embeds, in_pairs(states)

    def following(*inputs):
        logits, *states = step(*inputs)
        return logits, in_pairs(states)

    captioner.generation_config.eos_token_id = 98
    for size in SIZES:
        batch = left_padded(captioner.config, size=size)
        expected = captioner.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        chosen, _ = greedy(image, following, batch, captioner.config.num_image_tokens, 6)
        assert torch.equal(chosen, expected[:, -6:])


@needs_onnx
def test_a_step_reads_the_cache_for_its_products_only(tmp_path):
    captioner = tiny_captioner()
    graph = CaptionStep(captioner).to_onnx().model_proto.graph
    assert captioner.config._attn_implementation == "sdpa", "the model is as it was"
    layers = captioner.config.num_hidden_layers
    readers = {name: [] for layer in range(layers) for name in (f"present.{layer}.key", f"present.{layer}.value")}
    for node in graph.node:
        for name in readers.keys() & node.input:
            readers[name].append(node)
    for name, nodes in readers.items():
        assert [node.op_type for node in nodes] == (["Transpose"] if name.endswith("key") else ["MatMul"])
    transposed = {node.output[0] for nodes in readers.values() for node in nodes if node.op_type == "Transpose"}
    products = {name for node in graph.node if node.op_type == "MatMul" for name in node.input}
    assert len(transposed) == layers and transposed <= products


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("correct_cls_mask", [False, True])
def test_onnx_towers_of_coca_give_the_same(correct_cls_mask, tmp_path):
    """Whatever padding a text comes with, up to the length that leaves no room for the filler."""
    model = tiny_coca(correct_cls_mask=correct_cls_mask).model
    image, text = (session(tower(model), tmp_path / f"{tower.__name__}.onnx") for tower in (ImageTower, TextTower))
    for size, tokens in ((1, 4), (3, 9), (32, 24)):
        batch = coca_batch(model.config, size, tokens)
        close(image(batch["pixel_values"])[0], model.get_image_features(batch["pixel_values"]).pooler_output)
        embeds = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        close(text(batch["input_ids"], batch["attention_mask"])[0], embeds)
        left = [pad_left(batch[name], batch["attention_mask"]) for name in ("input_ids", "attention_mask")]
        close(text(*left)[0], embeds)


def coca_prompts(config, size: int) -> dict[str, torch.Tensor]:
    """Prompts of one to seven tokens padded on the left, in the first the filler as a word."""
    batch = coca_batch(config, size)
    mask = batch["attention_mask"].clone()
    mask[1::3, 1:] = 0
    ids, mask = pad_left(batch["input_ids"], mask), pad_left(mask, mask)
    return batch | {"input_ids": ids.masked_fill(mask == 0, config.pad_token_id), "attention_mask": mask}


def nothing_yet(step: CocaCaptionStep, batch: int) -> tuple:
    """Keys and values and filler marks of no tokens."""
    _, _, key_values, filler, _ = step.sample_inputs()
    empty = [[each[:1, :, :0].expand(batch, -1, -1, -1) for each in pair] for pair in key_values]
    return tuple(map(tuple, empty)), filler[:1, :, :0].expand(batch, -1, -1, -1)


@torch.no_grad()
@pytest.mark.parametrize("correct_cls_mask", [False, True])
def test_an_exported_step_of_coca_decodes_as_generate_does(correct_cls_mask):
    captioner = favour_the_filler(tiny_coca(correct_cls_mask=correct_cls_mask))
    captioner.generation_config.eos_token_id = 98
    tower, part = CocaImageTower(captioner), CocaCaptionStep(captioner)
    image, step = tower.to_program().module(), part.to_program().module()
    for size in SIZES:
        batch = coca_prompts(captioner.config, size)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        expected = captioner.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
        embeds, image_states = image(batch["pixel_values"])
        close(embeds, captioner.get_image_features(batch["pixel_values"]).pooler_output)
        ids, mask, states = batch["input_ids"], batch["attention_mask"], nothing_yet(part, size)
        for place in range(6):
            logits, *states = step(ids, mask, *states, image_states)
            close(logits[:, 0], expected.logits[place])
            ids, mask = logits.argmax(dim=-1), F.pad(mask, (0, 1), value=1)
            assert torch.equal(ids[:, 0], expected.sequences[:, place - 6])
    # and it takes several tokens behind a cache, which may hold the filler
    batch["input_ids"][2::3, 3] = captioner.config.filler_token_id
    for cuts in ((7,), (1, 7), (4, 7), (3, 5, 7)):
        states, past = nothing_yet(part, size), 0
        for end in cuts:
            seen = batch["attention_mask"][:, :end]
            logits, *states = step(batch["input_ids"][:, past:end], seen, *states, image_states)
            past = end
        close(logits, captioner(**batch, logits_to_keep=1).logits)


def sessions_of(captioner, folder) -> tuple:
    """Of ONNX Runtime, of the image's file and of the step's."""
    parts = CocaImageTower(captioner), CocaCaptionStep(captioner)
    for name, part in zip(("image", "step"), parts):
        part.to_onnx().save(folder / f"{name}.onnx")
    return tuple(open_session(folder / f"{name}.onnx") for name in ("image", "step"))


ODD = {  # one query for captions, a short table, heads as wide as the model, stacks of one layer
    "pooler_num_queries": 2,
    "max_position_embeddings": 5,
    "hidden_size": 24,
    "vision_hidden_size": 42,
    "pooler_num_attention_heads": 3,
    "text_num_attention_heads": 1,
    "text_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "correct_cls_mask": True,
}


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"correct_cls_mask": True}, ODD], ids=["usual", "corrected", "odd"])
def test_onnx_captions_of_coca_are_those_of_generate(shape, tmp_path):
    captioner = favour_the_filler(tiny_coca(3, **shape))
    captioner.generation_config.eos_token_id = [2, 40]
    config, most = captioner.config, captioner.config.max_position_embeddings - 1
    sessions = sessions_of(captioner, tmp_path)
    for size in SIZES:
        batch = coca_prompts(config, size)
        images, options = batch["pixel_values"], {"max_new_tokens": most, "do_sample": False}
        expected = captioner.generate(pixel_values=images, **options)
        assert torch.equal(greedy_ids(*sessions, config, [2, 40], images, 99), expected)
        prompts = {name: batch[name][:, -4:] for name in ("input_ids", "attention_mask")}
        expected = captioner.generate(pixel_values=images, **prompts, **options)
        assert torch.equal(greedy_ids(*sessions, config, [2, 40], images, 99, prompts), expected)


@needs_onnx
def test_onnx_captions_of_the_golden_coca_are_open_clips(tmp_path):
    expected = golden("coca")
    write_upstream(tmp_path, GOLDEN, under("sd/", expected))
    command = ["coca", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"), "--no-tokenizer"]
    assert convert(command) == 0
    captioner = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    sessions = sessions_of(captioner, tmp_path)
    ends = [captioner.config.eos_token_id]
    assert torch.equal(greedy_ids(*sessions, captioner.config, ends, expected["image"], 6), expected["greedy"])


def test_what_has_no_such_part_is_refused():
    coca, mome = tiny_coca(), tiny_captioner("dense")
    with pytest.raises(ValueError, match="CaptionStep takes mome models, this one is 'coca'"):
        CaptionStep(coca)
    with pytest.raises(ValueError, match="ImageTower takes mome models, this one is 'coca'"):
        ImageTower(coca.model, key_values=True)
    for part in (CocaImageTower, CocaCaptionStep):
        with pytest.raises(ValueError, match=f"{part.__name__} takes coca models, this one is 'mome'"):
            part(mome)
    other = torch.nn.Module()
    other.config = SiglipConfig()
    with pytest.raises(ValueError, match="TextTower takes mome and coca models, this one is 'siglip'"):
        TextTower(other)
