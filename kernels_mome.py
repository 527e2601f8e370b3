"""Quicker ways to compute the same: the reader finds the maths in `trunk_mome.py` and `routing_mome.py`.

- `all_experts_forward`: routed experts as one product over all of them, without a sort and without asking a GPU;
- `linear_of_few_rows`: a linear layer for the rows of a word or two.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

FEW_ROWS_OF_AN_EXPERT = 8  # up to which `linear_of_few_rows` is the quicker one for an expert's matrices
WEIGHT_PARTS = 8


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


def linear_of_few_rows(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`F.linear` for few rows (rows, in) on a CPU: as a batch of products of parts of the weight and rowsᵀ.

    Such a product mostly waits for the weights; for `rows @ weightᵀ` MKL would copy all of them into another order
    first. Measured on an AMD EPYC in float32, 320 to 576: 84 → 40 µs for one row, 118 → 70 for 4, 129 → 102 for 8.
    """
    parts = math.gcd(weight.shape[0], WEIGHT_PARTS)
    products = torch.bmm(weight.view(parts, -1, weight.shape[1]), inputs.t().expand(parts, -1, -1))
    return products.view(-1, inputs.shape[0]).t() + bias
