"""Ways to run the same model: attention kernels, precision, compiled, checkpointed, adapted, spread over devices."""

import peft
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import ACT2FN
from transformers.masking_utils import flash_attention_mask

import mome
from builders import build_processor
from models import VARIANTS, pad_left, random_batch, tiny_captioner
from mome.compatibility_mome import is_exporting
from mome.kernels_mome import (
    FEW_ROWS,
    ROWS_OF_TORCH,
    MomeLinear,
    activated_linear,
    has_onednn,
    matmul_attention_forward,
)

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def close(actual, expected, atol=1e-5):
    assert_close(actual, expected, atol=atol, rtol=0)


@every_variant
def test_eager_equals_sdpa(variant):
    captioner = tiny_captioner(variant)
    batch = random_batch(captioner.config)
    outputs = []
    for implementation in ("sdpa", "eager"):
        captioner.set_attn_implementation(implementation)
        fused = captioner.model.get_multimodal_features(**batch).last_hidden_state
        keep = F.pad(batch["attention_mask"].bool(), (captioner.config.num_image_tokens, 0), value=True)
        mask = pad_left(batch["attention_mask"], batch["attention_mask"])
        ids = pad_left(batch["input_ids"], batch["attention_mask"])
        caption = captioner.generate(
            pixel_values=batch["pixel_values"], input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False
        )
        loss = captioner(**batch, labels=batch["input_ids"]).loss
        outputs.append((captioner.model(**batch).logits_per_image, fused[keep], loss, caption))
    for sdpa, eager in zip(*outputs):
        close(eager, sdpa)


@every_variant
@torch.no_grad()
def test_whoever_asks_for_attentions_gets_them(variant):
    """SDPA has none to give: such a call takes the attention that is written out, and says the same."""
    captioner = tiny_captioner(variant)
    batch = random_batch(captioner.config)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    calls = [
        (captioner.model.get_image_features, {"pixel_values": batch["pixel_values"]}, "pooler_output"),
        (captioner.model.get_text_features, text, "pooler_output"),
        (captioner.model.get_multimodal_features, batch, "last_hidden_state"),
        (captioner, batch, "logits"),
        (captioner, batch | {"attention_mask": None}, "logits"),
    ]
    for call, inputs, name in calls:
        outputs = {}
        for kind in ("sdpa", "eager"):
            captioner.set_attn_implementation(kind)
            outputs[kind] = call(**inputs, output_attentions=True)
        captioner.set_attn_implementation("sdpa")
        assert len(outputs["sdpa"].attentions) == captioner.config.num_hidden_layers
        for found, expected in zip(outputs["sdpa"].attentions, outputs["eager"].attentions, strict=True):
            close(found, expected)
            close(found.sum(dim=-1), torch.ones(found.shape[:-1]))
        seen = outputs["sdpa"][name], call(**inputs)[name]
        keep = slice(None) if name == "pooler_output" else slice(0, 3)  # what padding sees is nobody's business
        close(seen[0][:, keep], seen[1][:, keep])
    half = captioner.bfloat16().model.get_image_features(batch["pixel_values"].bfloat16(), output_attentions=True)
    assert len(half.attentions) == captioner.config.num_hidden_layers


def test_compiling_is_no_export():
    """Otherwise what is compiled would take the experts of an export, and leave out what is checked when it runs."""

    class Asked(torch.nn.Module):
        def forward(self, numbers):
            return numbers + 1 if is_exporting() else numbers

    numbers = torch.zeros(2)
    torch.compiler.reset()
    assert torch.compile(Asked(), backend="eager", fullgraph=True)(numbers).tolist() == [0, 0]
    for strict in (True, False):
        assert torch.export.export(Asked(), (numbers,), strict=strict).module()(numbers).tolist() == [1, 1]
    assert not is_exporting()


def flash_like(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """What flash attention's kernels do: padding is cut out by a 2D mask, causal is aligned at the bottom right."""
    assert attention_mask is None or attention_mask.ndim == 2
    rows, keys = query.shape[2], key.shape[2]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if is_causal if is_causal is not None else module.is_causal:
        seen = seen.tril(keys - rows)
    seen = seen.expand(query.shape[0], 1, rows, keys)
    if attention_mask is not None:
        assert attention_mask.shape[1] == keys
        seen = seen & attention_mask[:, None, None, :].bool()
    states = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, dropout_p=dropout)
    return states.transpose(1, 2).nan_to_num(), None


@pytest.mark.parametrize("variant", ["dense", "routed", "unshared", "masked", "vlmo"])
def test_flash_attention_sees_what_sdpa_sees(variant):
    AttentionInterface.register("no_bias_kernel", flash_like)
    AttentionMaskInterface.register("no_bias_kernel", flash_attention_mask)
    captioner = tiny_captioner(variant)
    batch, images = random_batch(captioner.config, size=4), captioner.config.num_image_tokens
    left_mask = pad_left(batch["attention_mask"], batch["attention_mask"])
    left_ids = pad_left(batch["input_ids"], batch["attention_mask"])
    placed = F.pad(batch["input_ids"], (images, 0), value=captioner.config.image_token_id)
    placed_mask = F.pad(batch["attention_mask"], (images, 0), value=1)
    results = []
    for implementation in ("sdpa", "no_bias_kernel"):
        captioner.set_attn_implementation(implementation)
        prompts = [
            {"input_ids": left_ids, "attention_mask": left_mask},
            {"input_ids": pad_left(placed, placed_mask), "attention_mask": pad_left(placed_mask, placed_mask)},
            {},
        ]
        captions = [
            captioner.generate(**prompt, pixel_values=batch["pixel_values"], max_new_tokens=5, do_sample=False)
            for prompt in prompts
        ]
        embeds = captioner.model(**batch)
        last = captioner(
            pixel_values=batch["pixel_values"], input_ids=left_ids, attention_mask=left_mask, logits_to_keep=1
        )
        results.append([*captions, embeds.image_embeds, embeds.text_embeds, last.logits])
        if variant != "masked":
            valid = batch["attention_mask"].bool()
            results[-1].append(captioner(**batch).logits[valid])
    for flash, sdpa in zip(*results):
        close(flash, sdpa)


def test_flash_attention_refuses_what_it_cannot_do():
    AttentionInterface.register("no_bias_kernel", flash_like)
    AttentionMaskInterface.register("no_bias_kernel", flash_attention_mask)
    relative, masked = tiny_captioner("relative"), tiny_captioner("masked")
    for captioner in (relative, masked):
        captioner.set_attn_implementation("no_bias_kernel")
    batch = random_batch(relative.config)
    with pytest.raises(ValueError, match="'no_bias_kernel' has no attention bias"):
        relative.get_image_features(batch["pixel_values"])
    with pytest.raises(ValueError, match="'no_bias_kernel' can't score 7 tokens at once"):
        masked(**batch)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(variant, dtype):
    captioner = tiny_captioner(variant, initializer_range=0.05)
    batch = random_batch(captioner.config)
    expected = captioner(**batch, labels=batch["input_ids"])
    captioner = captioner.to(dtype)
    actual = captioner(**batch, labels=batch["input_ids"])
    assert actual.logits.dtype == dtype and actual.image_embeds.dtype == dtype
    assert F.cosine_similarity(actual.image_embeds.float(), expected.image_embeds).min() > 0.99
    assert abs(actual.loss.float() / expected.loss - 1) < 0.03
    actual.loss.backward()
    captions = captioner.generate(pixel_values=batch["pixel_values"], max_new_tokens=4, min_new_tokens=4)
    assert captions.shape == (3, 5)


@every_variant
def test_autocast_keeps_weights_and_gradients_in_fp32(variant):
    captioner = tiny_captioner(variant, initializer_range=0.05)
    batch = random_batch(captioner.config)
    expected = captioner(**batch, labels=batch["input_ids"]).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = captioner(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert abs(loss / expected - 1) < 0.03
    assert all(each.grad is None or each.grad.dtype == torch.float32 for each in captioner.parameters())


@every_variant
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(variant, use_reentrant):
    captioner = tiny_captioner(variant).train()
    batch = random_batch(captioner.config)

    def gradients():
        captioner.zero_grad(set_to_none=True)
        captioner(**batch, labels=batch["input_ids"]).loss.backward()
        return {name: each.grad for name, each in captioner.named_parameters() if each.grad is not None}

    expected = gradients()
    captioner.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients()
    assert actual.keys() == expected.keys() and any("router" in name for name in actual) == (
        captioner.config.experts_per_group > 1
    )
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("variant", ["dense", "routed", "relative"])
@pytest.mark.parametrize("tower", ["image", "text", "training"])
def test_towers_and_training_compile_without_graph_breaks(variant, tower):
    captioner = tiny_captioner(variant)
    batch = random_batch(captioner.config)

    def run(model):
        if tower == "image":
            return model.model.get_image_features(batch["pixel_values"]).pooler_output
        if tower == "text":
            return model.model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        return model(**batch, labels=batch["input_ids"]).loss

    torch.compiler.reset()
    explanation = torch._dynamo.explain(lambda: run(captioner))()
    assert explanation.graph_break_count == 0, explanation.break_reasons
    expected = run(captioner)
    compiled = torch.compile(lambda: run(captioner), fullgraph=True, backend="aot_eager")()
    close(compiled, expected)
    if tower == "training":
        compiled.backward()
        assert all(each.grad is not None for name, each in captioner.named_parameters() if "joint" not in name)


def test_a_compiled_captioner_is_told_of_image_tokens():
    captioner = tiny_captioner()
    batch, images = random_batch(captioner.config), captioner.config.num_image_tokens
    placed = F.pad(batch["input_ids"], (images, 0), value=captioner.config.image_token_id)
    inputs = {"pixel_values": batch["pixel_values"], "input_ids": placed}
    compiled = torch.compile(captioner, fullgraph=True, backend="aot_eager")
    close(compiled(**inputs, image_tokens_in_input=True).logits, captioner(**inputs).logits)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_attention_as_matrix_products_equals_sdpa(mask):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 9, 4, 8).permute(0, 1, 3, 2, 4)
    query = query[:, :, -5:]
    seen = torch.ones(5, 9, dtype=torch.bool).tril(4)
    masks = {"none": None, "causal": None, "bool": seen, "float": torch.randn(5, 9)}
    actual, _ = matmul_attention_forward(
        torch.nn.Module().eval(), query, key, value, masks[mask], scaling=0.3, is_causal=mask == "causal"
    )
    given = seen if mask == "causal" else masks[mask]
    close(actual, F.scaled_dot_product_attention(query, key, value, attn_mask=given, scale=0.3).transpose(1, 2))


@pytest.mark.skipif(not has_onednn(torch.float32), reason="this machine takes torch's own kernels")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 24), (4, 1, 24), (3, 5, 24), (20, 24), (2, 32, 24), (65, 24)])
def test_products_of_any_number_of_rows_are_the_same(shape, bias, monkeypatch):
    layer, inputs, parted = MomeLinear(24, 40, bias=bias), torch.randn(shape), []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda weight, rows: parted.append(len(weight)) or product(weight, rows))
    with torch.inference_mode():
        outputs = layer(inputs)
    assert parted == ([8] if inputs.numel() <= FEW_ROWS * 24 else [])
    close(outputs, F.linear(inputs, layer.weight, layer.bias))
    assert outputs.is_contiguous()
    parted.clear()
    assert layer(inputs).requires_grad
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    assert not parted


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("shape", [(1, 24), (FEW_ROWS + 1, 24), (2, ROWS_OF_TORCH[-1] // 2, 24), (2, 70, 24), (0, 24)])
def test_a_layer_and_its_gelu_in_one_pass_are_the_same(name, shape):
    layer, act_fn = MomeLinear(24, 40), ACT2FN[name]
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        layer, inputs = layer.to(dtype), torch.randn(shape, dtype=dtype)
        with torch.inference_mode():
            close(activated_linear(layer, act_fn, inputs), act_fn(F.linear(inputs, layer.weight, layer.bias)), atol)
    assert activated_linear(layer, act_fn, inputs).requires_grad


@pytest.mark.skipif(not has_onednn(torch.float32), reason="this machine has no kernel for it")
def test_a_layer_and_its_gelu_are_two_passes_where_somebody_has_a_say():
    layer, act_fn, inputs = MomeLinear(24, 40), ACT2FN["gelu"], torch.randn(ROWS_OF_TORCH[-1] + 1, 24)

    def is_one_pass(linear: torch.nn.Module) -> bool:
        with torch.inference_mode(), torch.profiler.profile() as seen:
            activated_linear(linear, act_fn, inputs)
        return "aten::gelu" not in {event.key for event in seen.key_averages()}

    assert is_one_pass(layer)
    assert not is_one_pass(torch.nn.Sequential(layer))  # as LoRA wraps a layer
    handle = layer.register_forward_hook(lambda module, args, output: output * 2)
    assert not is_one_pass(layer)
    handle.remove()
    layer.forward = layer.forward  # as offloading replaces it
    assert not is_one_pass(layer)


def test_what_a_layer_and_its_gelu_cost_is_counted():
    layer, inputs = MomeLinear(24, 40), torch.randn(2, ROWS_OF_TORCH[-1], 24)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        activated_linear(layer, ACT2FN["gelu"], inputs)
    assert counter.get_total_flops() == 2 * inputs.numel() * 40


def test_inductor_gives_the_same_embeddings():
    model = tiny_captioner("routed").model
    batch = random_batch(model.config)
    with torch.no_grad():
        expected = model.get_image_features(batch["pixel_values"]).pooler_output
        model.get_image_features = torch.compile(model.get_image_features, fullgraph=True)
        close(model.get_image_features(batch["pixel_values"]).pooler_output, expected)


@pytest.mark.parametrize("variant", ["dense", "routed"])
def test_lora_on_attention_and_experts_trains_and_reloads(variant, tmp_path):
    captioner = tiny_captioner(variant)
    batch = random_batch(captioner.config)
    layers = range(captioner.config.num_hidden_layers)
    experts = [
        f"model.encoder.layers.{layer}.feed_forward.{group}.experts.{matrix}"
        for layer in layers
        for group in ("image", "text")
        for matrix in ("up_proj", "down_proj")
    ]
    linear = r".*attention\.(query_key_value|output)\.\w+|.*feed_forward\.(image|text)\.(up|down)_proj"
    lora = peft.LoraConfig(
        r=2, target_modules=linear, target_parameters=experts if variant == "routed" else None, init_lora_weights=False
    )
    adapted = peft.get_peft_model(captioner, lora)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert trained and all("lora" in name for name in trained)
    touched = [name for name, each in adapted.named_parameters() if each.grad is not None and each.grad.abs().max()]
    assert any("query_key_value" in name for name in touched) and any("feed_forward" in name for name in touched)
    with torch.no_grad():
        expected = adapted(**batch).logits
    adapted.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(tiny_captioner(variant), tmp_path).eval()
    close(reloaded(**batch).logits, expected)
    assert (expected - tiny_captioner(variant)(**batch).logits).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["dense", "routed", "unshared", "relative"])
def test_device_map_with_offloading_gives_the_same(variant, tmp_path):
    captioner = tiny_captioner(variant)
    captioner.save_pretrained(tmp_path / "checkpoint")
    batch = random_batch(captioner.config)
    expected = captioner(**batch).logits
    names = [f"model.{name}" for name, _ in captioner.model.named_children() if name != "encoder"]
    device_map = dict.fromkeys([*names, "model.logit_scale", "lm_head"], "cpu")
    device_map |= {f"model.encoder.{name}": "cpu" for name, _ in captioner.model.encoder.named_children()}
    del device_map["model.encoder.layers"]
    device_map |= {"model.encoder.layers.0": "cpu", "model.encoder.layers.1": "disk"}
    spread = mome.MomeForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    close(spread(**batch).logits, expected)
    captions = spread.generate(pixel_values=batch["pixel_values"], max_new_tokens=3, do_sample=False)
    assert torch.equal(
        captions, captioner.generate(pixel_values=batch["pixel_values"], max_new_tokens=3, do_sample=False)
    )


@pytest.mark.parametrize("variant", ["dense", "routed", "masked"])
def test_a_tiny_batch_is_learnt_word_for_word_and_found(variant):
    """Six pictures: loss falls until every caption is reproduced and every picture is the first hit of its text."""
    processor = build_processor(image_size=16)
    captions = [f"a {colour} {shape}" for colour in ("red", "blue", "white") for shape in ("circle", "line")]
    config = tiny_captioner(
        variant, vocab_size=len(processor.tokenizer), initializer_range=0.05, max_position_embeddings=12
    ).config
    torch.manual_seed(0)
    captioner = mome.MomeForConditionalGeneration(config).train()
    batch = processor(text=captions, images=[draw(caption) for caption in captions], return_tensors="pt")
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-3)
    losses = []
    for _ in range(300):
        losses.append(captioner(**batch, labels=batch["input_ids"]).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    captioner.eval()
    generated = captioner.generate(pixel_values=batch["pixel_values"], max_new_tokens=8, do_sample=False)
    assert processor.batch_decode(generated, skip_special_tokens=True) == captions
    logits = captioner.model(**batch).logits_per_image
    assert logits.argmax(dim=1).tolist() == logits.argmax(dim=0).tolist() == list(range(len(captions)))


def draw(caption: str):
    from PIL import Image, ImageDraw

    _, colour, shape = caption.split()
    image = Image.new("RGB", (16, 16), "black")
    getattr(ImageDraw.Draw(image), {"circle": "ellipse", "line": "line"}[shape])((2, 2, 13, 13), fill=colour)
    return image
