"""Routed experts: every way to compute them is the same function, and what users do to a mixture works on it."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import mome
from models import random_batch, tiny_captioner, tiny_config
from mome.kernels_mome import FEW_ROWS, MANY_ROWS, grouped_linear, linear_of_few_rows
from mome.trunk_mome import FEW_EXPERTS_ON_CUDA, MomeExperts, MomeRouter

IMPLEMENTATIONS = ("eager", "all_experts", "batched_mm", "grouped_mm")
routed = pytest.mark.parametrize("variant", ["routed", "top1"])
each_implementation = pytest.mark.parametrize("implementation", ["eager", "all_experts"])


def experts_of(implementation: str, experts_per_token: int, **overrides) -> MomeExperts:
    """Four random experts, with biases, in float32; equal for equal arguments whatever the implementation."""
    options = {"experts_per_group": 4, "experts_per_token": experts_per_token, "expert_intermediate_size": 24}
    config = tiny_config(**(options | overrides))
    config._experts_implementation = implementation
    torch.manual_seed(0)
    experts = MomeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts


def choices_of(tokens: int, experts_per_token: int, unused: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, k) expert ids and weights that ask for a gradient; the expert `unused` is chosen by no token."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(tokens, 4, generator=generator)
    if unused is not None:
        logits[:, unused] = -100
    weights, index = logits.softmax(dim=-1).topk(experts_per_token, dim=-1)
    return index, weights.detach().requires_grad_()


def one_by_one(experts: MomeExperts, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor):
    """The definition: for each token the weighted sum of its experts."""
    outputs = []
    for token, state in enumerate(hidden_states):
        terms = []
        for expert, weight in zip(index[token], weights[token]):
            inner = experts.act_fn(F.linear(state, experts.up_proj[expert], experts.up_proj_bias[expert]))
            terms.append(weight * F.linear(inner, experts.down_proj[expert], experts.down_proj_bias[expert]))
        outputs.append(torch.stack(terms).sum(dim=0))
    return torch.stack(outputs)


@pytest.mark.parametrize("sub_layernorm", [False, True])
@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_and_gradients_are_those_of_the_experts_one_by_one(implementation, experts_per_token, sub_layernorm):
    hidden = torch.randn(21, 32, generator=torch.Generator().manual_seed(2))
    unused = 2 if experts_per_token < 4 else None
    results = []
    for compute in (lambda experts, *inputs: experts(*inputs), one_by_one):
        experts = experts_of(implementation, experts_per_token, sub_layernorm=sub_layernorm)
        states = hidden.clone().requires_grad_()
        index, weights = choices_of(21, experts_per_token, unused)
        outputs = compute(experts, states, index, weights)
        (outputs * torch.linspace(-0.1, 0.1, outputs.numel()).view_as(outputs)).sum().backward()
        results.append([outputs, states.grad, weights.grad, *[each.grad for each in experts.parameters()]])
    for actual, expected in zip(*results):
        assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    if unused is not None:
        assert not results[0][3][unused].any(), "an expert that no token uses must get no gradient"


@pytest.mark.parametrize("counts", [(1, 0, 0, 0), (3, 0, 8, 1), (9, 20, 0, 7), (200, 3, 90, 130)])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_a_grouped_product_is_a_linear_layer_for_each_expert(counts, dtype, atol):
    torch.manual_seed(0)
    inputs, weight = torch.randn(sum(counts), 24), torch.randn(4, 40, 24) * 0.2
    bias, scale = torch.randn(4, 40), torch.randn(sum(counts), 40)
    results = []
    for grouped in (True, False):
        leaves = [each.to(dtype).requires_grad_() for each in (inputs, weight, bias)]
        if grouped:
            outputs = grouped_linear(*leaves, torch.tensor(counts))
        else:
            rows, matrices, biases = leaves
            parts = [F.linear(part, matrices[e], biases[e]) for e, part in enumerate(rows.split(counts))]
            outputs = torch.cat(parts)
        outputs.backward(scale.to(dtype))
        results.append([outputs, *[each.grad for each in leaves]])
    assert (sum(counts) > MANY_ROWS) == (counts[0] == 200), "the last case is the one with windows of standard sizes"
    for actual, expected in zip(*results):
        assert_close(actual, expected, atol=atol * max(1, expected.abs().max().item()), rtol=0)


@pytest.mark.parametrize("counts", [(1, 0, 0, 0), (3, 0, FEW_ROWS, 1), (FEW_ROWS + 1, 2, 0, 0)])
def test_a_grouped_product_without_gradients_is_the_same(counts, monkeypatch):
    torch.manual_seed(0)
    arguments = torch.randn(sum(counts), 24), torch.randn(4, 40, 24), torch.randn(4, 40), torch.tensor(counts)
    few = []

    def count_rows(rows, *others):
        few.append(len(rows))
        return linear_of_few_rows(rows, *others)

    monkeypatch.setattr("mome.kernels_mome.linear_of_few_rows", count_rows)
    expected = grouped_linear(*arguments)
    assert not few
    with torch.no_grad():
        assert_close(grouped_linear(*arguments), expected, atol=1e-5, rtol=0)
    assert few == [count for count in counts if 0 < count <= FEW_ROWS]


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("sub_layernorm", [False, True])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tokens", [3, 90, MANY_ROWS])
def test_outputs_without_gradients_are_the_same(tokens, dtype, atol, sub_layernorm, activation):
    experts = experts_of("eager", 2, sub_layernorm=sub_layernorm, hidden_act=activation)
    hidden_states = torch.randn(tokens, experts.up_proj.shape[-1], generator=torch.Generator().manual_seed(2))
    index, weights = choices_of(tokens, 2, unused=1)
    expected = one_by_one(experts, hidden_states, index, weights)
    with torch.no_grad():
        outputs = experts.to(dtype)(hidden_states.to(dtype), index, weights.to(dtype))
    assert outputs.dtype == dtype
    assert_close(outputs.float(), expected, atol=atol * max(1, expected.abs().max().item()), rtol=0)


@pytest.mark.parametrize("out", [40, 7])
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS])
def test_a_linear_layer_of_few_rows_is_the_same(rows, out):
    inputs, weight, bias = torch.randn(rows, 24), torch.randn(out, 24), torch.randn(out)
    assert_close(linear_of_few_rows(inputs, weight, bias), F.linear(inputs, weight, bias), atol=1e-5, rtol=0)


@routed
@pytest.mark.parametrize("implementation", ["all_experts", "batched_mm", "grouped_mm"])
def test_a_model_gives_the_same_whatever_computes_its_experts(variant, implementation):
    captioner = tiny_captioner(variant)
    batch = random_batch(captioner.config)
    results = []
    for each in ("eager", implementation):
        captioner.set_experts_implementation(each)
        captioner.zero_grad()
        outputs = captioner(**batch, labels=batch["input_ids"])
        outputs.loss.backward()
        caption = captioner.generate(pixel_values=batch["pixel_values"], max_new_tokens=5, do_sample=False)
        gradients = [parameter.grad for parameter in captioner.parameters() if parameter.grad is not None]
        results.append([outputs.loss, outputs.logits, outputs.image_embeds, caption, *gradients])
    for actual, expected in zip(*results):
        assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_default_goes_by_device_and_number_of_experts(monkeypatch):
    def default(**overrides):
        return mome.MomeModel(tiny_config("routed", **overrides)).config._experts_implementation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default() == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default(experts_per_group=FEW_EXPERTS_ON_CUDA) == "all_experts"
    assert default(experts_per_group=FEW_EXPERTS_ON_CUDA + 1) == "grouped_mm"


def test_all_experts_asks_no_device_for_a_value():
    """On the meta device there are no values: a wait for one would be an error."""
    experts = experts_of("all_experts", 2, sub_layernorm=True).to("meta")
    hidden = torch.empty(5, 32, device="meta", requires_grad=True)
    index = torch.zeros(5, 2, dtype=torch.long, device="meta")
    outputs = experts(hidden, index, torch.empty(5, 2, device="meta"))
    outputs.sum().backward()
    assert outputs.shape == hidden.grad.shape == (5, 32)


# ------------------------------------------------------------------------------------ what users do to a mixture


@pytest.fixture
def folder(tmp_path) -> Path:
    """A routed checkpoint with its code beside it."""
    tiny_captioner("routed").save_pretrained(tmp_path / "routed")
    for file in Path(mome.__file__).parent.glob("*_mome.py"):
        shutil.copy(file, tmp_path / "routed")
    return tmp_path / "routed"


def test_experts_per_token_is_chosen_at_load(folder):
    batch = random_batch(tiny_config("routed"))
    embeds = {}
    for count in (1, 2, 4):
        model = mome.MomeModel.from_pretrained(folder, experts_per_token=count, output_loading_info=True)[0].eval()
        assert {each.experts_per_token for each in model.modules() if isinstance(each, MomeRouter)} == {count}
        assert model.config.experts_per_token == count
        embeds[count] = model.get_image_features(batch["pixel_values"]).pooler_output
    assert not torch.equal(embeds[1], embeds[2]) and not torch.equal(embeds[2], embeds[4])
    assert_close(embeds[2], tiny_captioner("routed").model.get_image_features(batch["pixel_values"]).pooler_output)


@pytest.mark.parametrize("count", [5, 0])
def test_a_number_of_experts_that_is_not_there_is_refused_at_load(folder, count):
    problem = "experts_per_token=5 is more than experts_per_group=4: choose 4 or fewer"
    problem = problem if count else "experts_per_token=0 must be at least 1"
    with pytest.raises(ValueError, match=problem):
        mome.MomeForConditionalGeneration.from_pretrained(folder, experts_per_token=count)


def test_code_beside_the_weights_knows_all_experts_too(folder):
    batch = random_batch(tiny_config("routed"))
    embeds = []
    remote = get_class_from_dynamic_module("modeling_mome.MomeModel", folder)
    assert remote is not mome.MomeModel and remote.__module__.startswith("transformers_modules")
    for implementation in ("eager", "all_experts"):
        model = remote.from_pretrained(folder, experts_implementation=implementation, output_loading_info=True)[0]
        assert model.config._experts_implementation == implementation
        embeds.append(model.eval().get_image_features(batch["pixel_values"]).pooler_output)
    assert_close(*embeds, atol=1e-6, rtol=1e-5)


@routed
def test_lora_on_all_linear_layers_merged_equals_unmerged(variant):
    captioner = tiny_captioner(variant)
    batch = random_batch(captioner.config)
    before = captioner(**batch).logits
    adapted = peft.get_peft_model(
        captioner, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    touched = [name for name, each in adapted.named_parameters() if each.grad is not None and each.grad.abs().max()]
    assert touched and all("lora" in name and "router" not in name for name in touched)
    unmerged = adapted(**batch).logits
    assert (unmerged - before).abs().max() > 1e-3
    assert_close(adapted.merge_and_unload()(**batch).logits, unmerged, atol=1e-4, rtol=1e-4)


@each_implementation
def test_lora_on_the_experts_merged_equals_unmerged(implementation):
    captioner = tiny_captioner("routed")
    captioner.set_experts_implementation(implementation)
    batch = random_batch(captioner.config)
    before = captioner(**batch).logits
    parameters = [
        f"model.encoder.layers.{layer}.feed_forward.{group}.experts.{matrix}"
        for layer in range(captioner.config.num_hidden_layers)
        for group in ("image", "text")
        for matrix in ("up_proj", "down_proj")
    ]
    options = {"r": 2, "target_modules": [], "target_parameters": parameters, "init_lora_weights": False}
    adapted = peft.get_peft_model(captioner, peft.LoraConfig(**options)).eval()
    unmerged = adapted(**batch).logits
    assert (unmerged - before).abs().max() > 1e-3
    assert_close(adapted.merge_and_unload()(**batch).logits, unmerged, atol=1e-4, rtol=1e-4)


def test_the_router_is_no_linear_layer_but_is_saved_and_starts_as_one():
    captioner = tiny_captioner("routed", hidden_size=64, num_hidden_layers=4)
    routers = {name: each for name, each in captioner.named_modules() if isinstance(each, MomeRouter)}
    assert routers and not any(isinstance(each, nn.Linear) for each in routers.values())
    state = captioner.state_dict()
    for name in routers:
        assert [key for key in state if key.startswith(f"{name}.")] == [f"{name}.weight"]
        assert state[f"{name}.weight"].shape == (4, 64)
    start = torch.cat([each.weight.flatten() for each in routers.values()])
    assert abs(start.std() / captioner.config.initializer_range - 1) < 0.1 and abs(start.mean()) < 0.02


@routed
@each_implementation
def test_compiled_training_gives_the_same(variant, implementation):
    captioner = tiny_captioner(variant)
    captioner.set_experts_implementation(implementation)
    batch = random_batch(captioner.config)
    torch.compiler.reset()
    expected = captioner(**batch, labels=batch["input_ids"]).loss
    expected.backward()
    gradients = {name: each.grad.clone() for name, each in captioner.named_parameters() if each.grad is not None}
    captioner.zero_grad()
    compiled = torch.compile(captioner, fullgraph=True, backend="aot_eager")
    loss = compiled(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, each in captioner.named_parameters():
        if name in gradients:
            assert_close(each.grad, gradients[name], atol=1e-5, rtol=1e-4)


@routed
def test_inductor_makes_one_product_of_all_experts(variant):
    model = tiny_captioner(variant).model
    model.set_experts_implementation("all_experts")
    batch = random_batch(model.config)
    with torch.no_grad():
        expected = model.get_image_features(batch["pixel_values"]).pooler_output
        compiled = torch.compile(lambda pixels: model.get_image_features(pixels).pooler_output, fullgraph=True)
        assert_close(compiled(batch["pixel_values"]), expected, atol=1e-5, rtol=1e-5)


@routed
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_stays_close(variant, autocast):
    captioner = tiny_captioner(variant, initializer_range=0.05)
    captioner.set_experts_implementation("all_experts")
    batch = random_batch(captioner.config)
    expected = captioner(**batch, labels=batch["input_ids"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = (captioner if autocast else captioner.bfloat16())(**batch, labels=batch["input_ids"])
    actual.loss.backward()
    assert abs(actual.loss.float() / expected.loss - 1) < 0.03
    assert F.cosine_similarity(actual.image_embeds.float(), expected.image_embeds).min() > 0.99
    dtype = torch.float32 if autocast else torch.bfloat16
    assert all(each.grad is None or each.grad.dtype == dtype for each in captioner.parameters())


@routed
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(variant, use_reentrant):
    captioner = tiny_captioner(variant).train()
    captioner.set_experts_implementation("all_experts")
    batch = random_batch(captioner.config)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            captioner.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        captioner.zero_grad(set_to_none=True)
        captioner(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: each.grad for name, each in captioner.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-4, msg=name)


def test_gradients_add_up_over_parts_of_a_batch():
    """What gradient accumulation relies on: a part's gradients don't depend on the tokens of another part."""
    gradients = []
    for sizes in ((4,), (2, 2)):
        experts = experts_of("all_experts", 2)
        hidden = torch.randn(4 * 7, 32, generator=torch.Generator().manual_seed(3))
        index, weights = choices_of(4 * 7, 2)
        for part in torch.arange(4 * 7).split([7 * size for size in sizes]):
            experts(hidden[part], index[part], weights[part]).square().sum().backward()
        gradients.append([each.grad for each in experts.parameters()])
    for parts, whole in zip(gradients[1], gradients[0]):
        assert_close(parts, whole, atol=1e-4, rtol=1e-5)


class ImageTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values).pooler_output


@routed
@each_implementation
def test_a_routed_tower_is_exported_for_any_batch(variant, implementation):
    model = tiny_captioner(variant).model
    model.set_experts_implementation(implementation)
    batch = torch.export.Dim("batch", min=1, max=64)
    pixels = random_batch(model.config, size=3)["pixel_values"]
    exported = torch.export.export(ImageTower(model), (pixels,), dynamic_shapes={"pixel_values": {0: batch}})
    for size in (3, 5):
        pixels = random_batch(model.config, size=size)["pixel_values"]
        expected = model.get_image_features(pixels).pooler_output
        assert_close(exported.module()(pixels), expected, atol=1e-5, rtol=1e-5)
