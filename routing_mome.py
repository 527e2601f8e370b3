"""Learned routing inside a modality: which expert takes which token, and what keeps the experts in use.

- `MomeRouter`: softmax over the experts of one group, top-k, in fp32;
- `grouped_linear`: one matrix per expert over rows sorted by expert, without dropping a token;
- `router_losses`: balance loss and z-loss of each group (`image`, `text`, `joint`) over its own tokens.

    hidden (tokens, width) ─ router ─ (tokens, k) experts and weights ─ sort by expert ─ grouped_linear ─ act
                                                     (tokens, width) ─ weighted sum ─ unsort ─ grouped_linear
"""

import torch
from torch import nn
from torch.nn import functional as F


class MomeRouter(nn.Linear):
    """Chooses `experts_per_token` of the experts of one group for each of its tokens.

    A router only knows the experts of its own group, so that the softmax over its logits is the group-masked
    softmax over all experts: p = softmax(logits), top-k, renormalised if k > 1. With k = 1 the raw p is kept, or
    the router would get no gradient (Switch, 2101.03961).
    """

    def __init__(self, config):
        super().__init__(config.hidden_size, config.experts_per_group, bias=False)
        self.experts_per_token = config.experts_per_token

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_states (tokens, width) → logits (tokens, experts) fp32, weights and expert ids (tokens, k)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
        top_k_weights, top_k_index = logits.softmax(dim=-1).topk(self.experts_per_token, dim=-1)
        if self.experts_per_token > 1:
            top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return logits, top_k_weights.to(hidden_states.dtype), top_k_index


def _windows(tokens_per_expert: torch.Tensor, rows: int):
    """For each expert in use (expert, its first row, its end, first row and end of a window of a standard size).

    The window holds the expert's rows and some of its neighbours'. A library such as oneDNN builds a kernel per
    matrix shape: row counts that change with every batch would cost more than the rows computed in vain.
    """
    average = max(rows // len(tokens_per_expert), 1)
    step = max(16, 2 ** (average.bit_length() - 4))
    start = 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        if count:
            size = min(-(-count // step) * step, rows)
            window = min(start, rows - size)
            yield expert, start, start + count, window, window + size
        start += count


def _grouped_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    outputs = inputs.new_empty(inputs.shape[0], weight.shape[1])
    for expert, start, end, first, last in _windows(tokens_per_expert, inputs.shape[0]):
        window = F.linear(inputs[first:last], weight[expert], bias[expert])
        outputs[start:end] = window[start - first : end - first]
    return outputs


def _grouped_linear_backward(
    grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, tokens_per_expert: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of inputs (rows, in), weight (experts, out, in) and bias (experts, out)."""
    grad = grad.contiguous()
    grad_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    grad_weight, grad_bias = torch.zeros_like(weight), grad.new_zeros(weight.shape[:2])
    for expert, start, end, first, last in _windows(tokens_per_expert, inputs.shape[0]):
        window = grad[first:last].clone()
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
    return torch.ops.mome.grouped_linear(inputs, weight, bias, tokens_per_expert)


def permute_rows(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`rows[order]` for a permutation of the rows (rows, width) and its inverse."""
    return torch.ops.mome.permute_rows(rows, order, inverse)


def router_sums(
    logits: torch.Tensor, experts_per_token: int, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the balance and z-losses are made of, as sums over the tokens of one group in one layer.

    Sums can be added up over parts of a batch and over processes; `router_losses_of` makes losses of them.

    Args:
        logits: (batch, tokens, experts) fp32, over the experts of the group.
        experts_per_token: assignments per token.
        token_mask: (batch, tokens), 0 where padding; `None`: no padding.

    Returns:
        assignments (experts,), without gradient; probabilities (experts,); squared logsumexp (); tokens ().
    """
    experts = logits.shape[-1]
    logits = logits.reshape(-1, experts)
    mask = logits.new_ones(logits.shape[0]) if token_mask is None else token_mask.reshape(-1).to(logits.dtype)
    # (batch · tokens, experts): 1 for those that are used. On a CPU, one_hot would look at the indices.
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(experts_per_token, dim=-1).indices, 1.0)
    assignments = (chosen * mask[:, None]).sum(dim=0)
    probability = (logits.softmax(dim=-1) * mask[:, None]).sum(dim=0)
    return assignments, probability, (logits.logsumexp(dim=-1).square() * mask).sum(), mask.sum()


def router_losses_of(
    assignments: torch.Tensor, probability: torch.Tensor, squared_logsumexp: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balance loss and z-loss from the sums of `router_sums`; leading dimensions (layers, groups, …) are kept.

    The balance loss is E Σ_e f_e P_e (Switch, 2101.03961, eq. 4; per modality: LIMoE, 2206.02770) with f_e the share
    of the assignments that expert e got and P_e its mean probability: 1 when balanced. The z-loss is the mean of
    logsumexp(logits)² (ST-MoE, 2202.08906, eq. 5).
    """
    share = assignments / assignments.sum(dim=-1, keepdim=True).clamp(min=1)
    tokens = tokens.clamp(min=1)
    balance = assignments.shape[-1] * (share * probability).sum(dim=-1) / tokens
    return balance, squared_logsumexp / tokens


def router_losses(
    logits: torch.Tensor, experts_per_token: int, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balance loss and z-loss of one group in one layer, two scalars; the assignments are those of all processes.

    Arguments as those of `router_sums`.
    """
    assignments, *sums = router_sums(logits, experts_per_token, token_mask)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(assignments)
    return router_losses_of(assignments, *sums)
