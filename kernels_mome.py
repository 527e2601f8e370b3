"""Quicker ways to compute the same: the reader finds the maths in `trunk_mome.py` and `routing_mome.py`.

- `MomeLinear`, `activated_linear`: a linear layer, and one with its activation, by the kernels of `quick_linear`;
- `matmul_attention_forward`: SDPA as two matrix products, for half precision on a CPU;
- `all_experts_forward`: routed experts as one product over all of them, without a sort and without asking a GPU;
- `sorted_experts_forward`: routed experts one after the other, each over its own rows, without dropping a token:

    hidden (tokens, width) ─ k rows a token ─ permute_rows: sorted by expert ─ grouped_linear ─ act ─┐
                (tokens, width) ─ weighted sum over k ─ permute_rows: back ─ grouped_linear ─────────┘
"""

import functools
import math
import platform

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers.integrations.moe import ExpertsInterface
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

FEW_ROWS = 2  # in float32, up to which a CPU multiplies them with parts of a weight, see `quick_linear`
ROWS_OF_TORCH = range(17, 65)  # in float32, for which oneDNN gains least
MANY_ROWS = 256  # of all experts, from which half precision pays for windows of standard sizes, see `_windows`
WEIGHT_PARTS = 8


# ---------------------------------------------------------------------------------------------- linear layers


class MomeLinear(nn.Linear):
    """`nn.Linear` that takes the quickest kernel where only outputs are wanted, on a CPU; see `quick_linear`."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.chooses_kernel(inputs):  # before any size is looked at, which an export would take for fixed
            return super().forward(inputs)
        return quick_linear(inputs, self.weight, self.bias)

    def chooses_kernel(self, inputs: torch.Tensor) -> bool:
        """Whether this is a plain product on a CPU. Compilers choose for themselves, as do weights of other types."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if type(self.weight) is not nn.Parameter or torch.is_autocast_enabled("cpu"):
            return False
        return self.weight.device == inputs.device and self.weight.dtype == inputs.dtype and _has_kernels(inputs)


def quick_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None
) -> torch.Tensor:
    """`F.linear`, (..., in) → (..., out), or with `gelu` its GELU, see `GELUS`: by the quickest kernel of an x86 CPU.

    - One or two rows in float32, as in a decoding step: `linear_of_few_rows`.
    - oneDNN, which computes a GELU in the pass that writes the product; half precision is rounded once. In float32,
      from 17 to 64 rows, torch: oneDNN would gain a tenth there, but sums in another order, and small models are
      compared with others' to 1e-5.

    Measured on an AMD EPYC for layers of a ViT-B, of width 512 and of mome-icons, times as fast as `F.linear`: parts
    of a weight 1.1 to 1.6 with two threads; oneDNN in float32 1 to 1.8 for 4 to 8 rows with two threads, 1.04 to 1.16
    for more than 64 with one, in bfloat16 1 to 1.1; with a GELU, for more than 64 rows, 1.2 to 1.5 in the tanh form
    and 1.03 to 1.3 in the exact one.
    """
    rows = inputs.shape[:-1].numel()
    is_float32 = inputs.dtype == torch.float32
    if not (is_float32 and (rows <= FEW_ROWS or rows in ROWS_OF_TORCH)):
        attribute = "none" if gelu is None else "gelu"
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, attribute, [], gelu)
    if rows <= FEW_ROWS:
        outputs = linear_of_few_rows(inputs.reshape(rows, -1), weight, bias).view(*inputs.shape[:-1], -1)
    else:
        outputs = F.linear(inputs, weight, bias)
    return outputs if gelu is None else F.gelu(outputs, approximate=gelu)


def linear_of_few_rows(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` for few rows (rows, in) on a CPU: as a batch of products of parts of the weight and rowsᵀ.

    Such a product mostly waits for the weights; for `rows @ weightᵀ` MKL would copy all of them into another order
    first. Measured on an AMD EPYC in float32, 320 to 576: 84 → 40 µs for one row, 118 → 70 for 4, 129 → 102 for 8.
    """
    parts = math.gcd(weight.shape[0], WEIGHT_PARTS)
    products = torch.bmm(weight.view(parts, -1, weight.shape[1]), inputs.t().expand(parts, -1, -1))
    outputs = products.view(-1, inputs.shape[0]).t().contiguous()
    return outputs if bias is None else outputs.add_(bias)


# Activations of transformers that oneDNN computes while it writes a product, and what it calls them.
GELUS = {"GELUActivation": "none", "GELUTanh": "tanh"}


def activated_linear(linear: nn.Module, act_fn: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`act_fn(linear(inputs))`: (..., in) → (..., out); in one pass where `quick_linear` can."""
    gelu = _gelu_of(act_fn)
    if gelu is None or type(linear) is not MomeLinear or _is_watched(linear) or not linear.chooses_kernel(inputs):
        return act_fn(linear(inputs))
    return quick_linear(inputs, linear.weight, linear.bias, gelu)


def _gelu_of(act_fn: nn.Module) -> str | None:
    """What oneDNN calls it, if it is a GELU and nothing else."""
    return None if _is_watched(act_fn) else GELUS.get(type(act_fn).__name__)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody else has a say in what it computes: a hook, offloading."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _has_kernels(inputs: torch.Tensor) -> bool:
    return inputs.device.type == "cpu" and inputs.numel() > 0 and has_onednn(inputs.dtype)


@functools.cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN has kernels of its own for it: others are emulated, more slowly."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


if has_onednn(torch.float32) and torch.ops.mkldnn._linear_pointwise not in flop_registry:  # this file, loaded twice

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _count_flops(inputs_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * math.prod(inputs_shape) * weight_shape[0]


# -------------------------------------------------------------------------------------------------- attention


def matmul_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """What SDPA computes, as two matrix products: a CPU is faster at them in half precision, above all in decoding."""
    query, key, value = (_with_heads_in_line(states) for states in (query * scaling, key, value))
    scores = masked_scores(query @ key.transpose(-1, -2), attention_mask, is_causal)
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), None


def masked_scores(scores: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    """Scores (batch, heads, tokens, keys) under a mask as SDPA takes it: bool, added, or none and causal."""
    tokens, keys = scores.shape[-2:]
    if attention_mask is None and is_causal and tokens > 1:
        attention_mask = torch.ones(tokens, keys, dtype=torch.bool, device=scores.device).tril(keys - tokens)
    if attention_mask is None:
        return scores
    if attention_mask.dtype == torch.bool:
        return scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return scores + attention_mask


def _with_heads_in_line(states: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, head_dim), copied if batch and heads can't be one dimension: a product would do so twice.

    The views that a cache hands out can, those that come from a fused projection can't.
    """
    in_line = states.stride(0) == states.shape[1] * states.stride(1) or states.shape[0] == 1
    return states if in_line and states.stride(3) == 1 else states.contiguous()


def is_faster_as_matmul(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Half precision on a CPU, while the scores are small enough to write down."""
    if query.device.type != "cpu" or query.dtype == torch.float32:
        return False
    # An exported graph with any number of keys must not be bound to a part of them.
    return not isinstance(keys.shape[2], int) or keys.shape[2] <= 1024


# ---------------------------------------------------------------------------------------------------- experts


def all_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Every token meets all experts of its group, side by side; those that it has not chosen count 0 times.

        y = Σ_e w_e (D_e act(U_e x + u_e) + d_e) = D (w ⊙ act(U x + u)) + Σ_e w_e d_e,  w_e = 0 if e is not chosen

    with U the matrices U_e above one another and D the matrices D_e side by side: the outputs and gradients of the
    experts taken one by one. It costs `experts_per_group / experts_per_token` times the products and saves all that
    goes with rows that are sorted by expert: on a GPU the wait for their number. Known to transformers as
    `experts_implementation="all_experts"`.

    Args:
        experts: `MomeExperts`.
        hidden_states: (tokens, width).
        top_k_index: (tokens, k) int64, the chosen experts.
        top_k_weights: (tokens, k), what they count.

    Returns:
        (tokens, width) in the dtype of `hidden_states`.
    """
    weights = top_k_weights.new_zeros(hidden_states.shape[0], experts.num_experts)
    weights = weights.scatter(1, top_k_index, top_k_weights)  # (tokens, experts)
    # (tokens, width) → (tokens, experts · inner) → (tokens, experts, inner)
    inner = F.linear(hidden_states, experts.up_proj.flatten(0, 1), experts.up_proj_bias.flatten())
    inner = experts.act_fn(inner.unflatten(-1, (experts.num_experts, -1)))
    inner = (inner * weights[..., None].to(inner.dtype)).flatten(1)
    # (experts, width, inner) → (width, experts · inner)
    outputs = F.linear(inner, experts.down_proj.transpose(0, 1).flatten(1))
    return (outputs + weights.to(outputs.dtype) @ experts.down_proj_bias.to(outputs.dtype)).to(hidden_states.dtype)


ExpertsInterface.register("all_experts", all_experts_forward)


def sorted_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The chosen experts of each token, computed one expert after the other: `experts_implementation="eager"`.

    Arguments and result as those of `all_experts_forward`.
    """
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    tokens, k = top_k_index.shape
    expert_ids, order = top_k_index.reshape(-1).sort(stable=True)
    inverse = order.argsort()
    tokens_per_expert = F.one_hot(expert_ids, experts.num_experts).sum(dim=0)
    rows = _rows_of_experts(hidden_states.to(dtype), order, inverse, k)
    up = experts.up_proj.to(dtype), experts.up_proj_bias.to(dtype)
    gelu = _gelu_of(experts.act_fn) if not _needs_operators() and _has_kernels(rows) else None
    if gelu is not None:
        inner = _grouped_products(rows, *up, tokens_per_expert, True, gelu)
    else:
        inner = experts.act_fn(grouped_linear(rows, *up, tokens_per_expert)).to(dtype)
    outputs = grouped_linear(inner, experts.down_proj.to(dtype), experts.down_proj_bias.to(dtype), tokens_per_expert)
    # back in the order of the tokens: (tokens, k, width), weighted and summed over k
    outputs = permute_rows(outputs, inverse, order).unflatten(0, (tokens, k))
    return (outputs * top_k_weights[..., None].to(dtype)).sum(dim=1).to(hidden_states.dtype)


def _rows_of_experts(hidden_states: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, k: int) -> torch.Tensor:
    """(tokens, width) → (tokens · k, width), each token k times, sorted by expert."""
    if not _needs_operators():
        return hidden_states.index_select(0, order // k)
    rows = hidden_states[:, None].expand(-1, k, -1).reshape(len(order), -1)
    return permute_rows(rows, order, inverse)


def grouped_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """Linear layer with one matrix per expert over rows that are sorted by expert.

    Args:
        inputs: (rows, in), the first `tokens_per_expert[0]` rows for expert 0, and so on.
        weight: (experts, out, in).
        bias: (experts, out).
        tokens_per_expert: (experts,) int64, sums to `rows`.

    Returns:
        (rows, out)
    """
    if _needs_operators():
        return torch.ops.mome.grouped_linear(inputs, weight, bias, tokens_per_expert)
    return _grouped_products(inputs, weight, bias, tokens_per_expert, quick=_has_kernels(inputs))


def permute_rows(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`rows[order]` for a permutation of the rows (rows, width) and its inverse."""
    permute = torch.ops.mome.permute_rows if _needs_operators() else _permute_rows
    return permute(rows, order, inverse)


def _needs_operators() -> bool:
    """Whether somebody may ask for gradients or for a graph. What only computes takes the short way."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()


def _windows(tokens_per_expert: torch.Tensor, rows: int, standard_sizes: bool):
    """For each expert in use (expert, its first row, its end, first row and end of the window to compute).

    The window is the expert's rows; with `standard_sizes` some of its neighbours' too. In half precision oneDNN
    builds a kernel per matrix shape: row counts that change with every batch would cost more than the rows computed
    in vain. A single row gets a neighbour: the last bit of its product would depend on where the weights lie.
    """
    average = max(rows // len(tokens_per_expert), 1)
    step = max(16, 2 ** (average.bit_length() - 4)) if standard_sizes else 1
    start = 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        if count:
            size = min(max(-(-count // step) * step, 2), rows)
            window = min(start, rows - size)
            yield expert, start, start + count, window, window + size
        start += count


def _wants_standard_sizes(inputs: torch.Tensor) -> bool:
    return inputs.device.type == "cpu" and inputs.dtype != torch.float32 and inputs.shape[0] > MANY_ROWS


def _grouped_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    return _grouped_products(inputs, weight, bias, tokens_per_expert, quick=False)


def _grouped_products(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    quick: bool,
    gelu: str | None = None,
) -> torch.Tensor:
    """`grouped_linear`, or with `gelu` the GELU of it, see `GELUS`. With `quick`, by the kernels for outputs only."""
    outputs = inputs.new_empty(inputs.shape[0], weight.shape[1])
    for expert, start, end, first, last in _windows(tokens_per_expert, len(inputs), _wants_standard_sizes(inputs)):
        matrix, shift = weight[expert], bias[expert]
        if quick and inputs.dtype == torch.float32:
            outputs[start:end] = quick_linear(inputs[start:end], matrix, shift, gelu)
        elif quick:
            outputs[start:end] = quick_linear(inputs[first:last], matrix, shift, gelu)[start - first : end - first]
        elif (first, last) == (start, end):
            torch.addmm(shift, inputs[start:end], matrix.T, out=outputs[start:end])
        else:
            outputs[start:end] = F.linear(inputs[first:last], matrix, shift)[start - first : end - first]
    return outputs


def _grouped_linear_backward(
    grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, tokens_per_expert: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of inputs (rows, in), weight (experts, out, in) and bias (experts, out)."""
    grad = grad.contiguous()
    grad_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    grad_weight, grad_bias = torch.zeros_like(weight), grad.new_zeros(weight.shape[:2])
    for expert, start, end, first, last in _windows(tokens_per_expert, len(inputs), _wants_standard_sizes(inputs)):
        window = grad[first:last]
        if (first, last) != (start, end):
            window = window.clone()
            window[: start - first] = 0  # the neighbours' rows count for their own experts only
            window[end - first :] = 0
        grad_inputs[start:end] = (window @ weight[expert])[start - first : end - first]
        torch.mm(window.T, inputs[first:last], out=grad_weight[expert])
        grad_bias[expert] = window.sum(dim=0)
    return grad_inputs, grad_weight, grad_bias


def _permute_rows(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    return rows.index_select(0, order)


def _register_operators():
    """Make the custom operators. The loop bounds of one are data, so that torch.compile would have to break its graph;
    the gradient of the other is a permutation too, where autograd would add up row by row.

    A process may load this file more than once, from the package and from beside a checkpoint's weights. To register
    an operator again would pull it from under the modules that hold it. Whoever changes what it does renames it.
    """
    forward = torch.library.custom_op("mome::grouped_linear", _grouped_linear, mutates_args=())
    backward = torch.library.custom_op("mome::grouped_linear_backward", _grouped_linear_backward, mutates_args=())

    @forward.register_fake
    def _(inputs, weight, bias, tokens_per_expert):
        return inputs.new_empty(inputs.shape[0], weight.shape[1])

    @backward.register_fake
    def _(grad, inputs, weight, tokens_per_expert):
        grad_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        return grad_inputs, torch.empty_like(weight), grad.new_empty(weight.shape[:2])

    def keep_for_backward(ctx, inputs, output):
        rows, weight, _, tokens_per_expert = inputs
        ctx.save_for_backward(rows, weight, tokens_per_expert)

    def run_backward(ctx, grad):
        return *backward(grad, *ctx.saved_tensors), None

    forward.register_autograd(run_backward, setup_context=keep_for_backward)

    permute = torch.library.custom_op("mome::permute_rows", _permute_rows, mutates_args=())

    @permute.register_fake
    def _(rows, order, inverse):
        return torch.empty_like(rows, memory_format=torch.contiguous_format)

    def keep_order(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], inputs[2])

    def permute_back(ctx, grad):
        order, inverse = ctx.saved_tensors
        return permute(grad, inverse, order), None, None

    permute.register_autograd(permute_back, setup_context=keep_order)


if not hasattr(torch.ops.mome, "grouped_linear"):
    _register_operators()
