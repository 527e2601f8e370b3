"""The contrastive loss over all processes, with the exact gradient.

    own rows ─ all_gather ─ everyone's rows ─ own × everyone similarities ─ loss of the own rows
                                              (a block of rows at a time in `contrastive_gradients`)

Averaged over two processes, as DDP and FSDP average gradients: a gather without gradient gives the encoders half of
theirs or, with a loss over the own rows only, one that points elsewhere. Hence `_AllGather`.
"""

import torch
from torch import distributed

from ..losses_mome import info_nce, sigmoid_terms


class _AllGather(torch.autograd.Function):
    """Rows of all processes; the gradient of a row is the sum of what every process wants of it."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        ctx.own = slice(distributed.get_rank() * len(rows), (distributed.get_rank() + 1) * len(rows))
        return _gather(rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # others may hold it, and it is added to
        distributed.all_reduce(gradient)
        return gradient[ctx.own]


def _gather(rows: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def all_gather(rows: torch.Tensor) -> torch.Tensor:
    """(rows, …) of this process → (processes · rows, …) of all, with the exact gradient."""
    if world_size() == 1:
        return rows
    return _AllGather.apply(rows) if rows.is_floating_point() else _gather(rows)


def contrastive_loss_over_ranks(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    positive_ids: torch.Tensor,
    valid: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-positive InfoNCE of the whole batch, this process's share of it times the number of processes.

    Each process compares its own images and texts with those of all; the mean over the processes, which DDP and FSDP
    take of gradients, is the loss of `losses_mome.contrastive_loss` over the whole batch (UniCL, 2204.03610). With a
    bias it is the sigmoid loss, `losses_mome.sigmoid_loss` (2303.15343): its own images with the texts of all.

    Args:
        image_embeds, text_embeds: (pairs, projection_dim), L2-normalised.
        logit_scale: (), inverse temperature.
        positive_ids: (pairs, columns) int64; rows that agree in a column are positives of each other.
        valid: (pairs,) bool; other rows count neither as positives nor as negatives.
        logit_bias: (), of the sigmoid objective.
    """
    everyone = all_gather(image_embeds), all_gather(text_embeds)
    all_ids, all_valid = all_gather(positive_ids), all_gather(valid.to(torch.uint8)).bool()
    own = image_embeds, text_embeds
    return _loss_of_rows(own, everyone, (logit_scale, logit_bias), positive_ids, valid, all_ids, all_valid)


def _loss_of_rows(own, everyone, scale_and_bias, own_ids, own_valid, all_ids, all_valid) -> torch.Tensor:
    """The loss's terms of some rows: `own` and `everyone` are pairs of image and text embeddings."""
    logit_scale, logit_bias = scale_and_bias
    pairs = own_valid[:, None] & all_valid[None]
    positives = (own_ids[:, None] == all_ids[None]).any(dim=2) & pairs
    if logit_bias is not None:
        terms = sigmoid_terms(logit_scale * own[0] @ everyone[1].T + logit_bias, positives)
        return (terms * pairs).sum() * world_size() / all_valid.sum().clamp(min=1)
    loss = own[0].new_zeros(())
    for rows, others in ((own[0], everyone[1]), (own[1], everyone[0])):
        logits = (logit_scale * rows @ others.T).masked_fill(~all_valid, torch.finfo(rows.dtype).min)
        loss = loss + info_nce(logits, positives).sum() / 2
    return loss * world_size() / all_valid.sum().clamp(min=1)


def contrastive_gradients(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    positive_ids: torch.Tensor,
    valid: torch.Tensor,
    rows: int,
    logit_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """`contrastive_loss_over_ranks` and its gradients, with `rows` rows of similarities in memory at once.

    Returns:
        The loss, and its gradients with respect to the first three arguments and the bias, summed over the processes.
    """
    everyone = [all_gather(each.detach()).clone().requires_grad_() for each in (image_embeds, text_embeds)]
    scale = logit_scale.detach().clone().requires_grad_()
    bias = None if logit_bias is None else logit_bias.detach().clone().requires_grad_()
    all_ids, all_valid = all_gather(positive_ids), all_gather(valid.to(torch.uint8)).bool()
    first = len(image_embeds) * (distributed.get_rank() if world_size() > 1 else 0)
    total = image_embeds.new_zeros(())
    for start in range(0, len(image_embeds), rows):
        block = slice(start, start + rows)
        # A row is compared with all and is one of them: both roles are the same leaf, and its gradient has both.
        own = [each[first + start : first + start + len(valid[block])] for each in everyone]
        with torch.enable_grad():
            scale_and_bias = scale, bias
            loss = _loss_of_rows(own, everyone, scale_and_bias, positive_ids[block], valid[block], all_ids, all_valid)
        loss.backward()
        total = total + loss.detach()
    gradients = [each.grad for each in everyone]
    if world_size() > 1:
        for gradient in gradients:
            distributed.all_reduce(gradient)
    own = slice(first, first + len(image_embeds))
    return total, (gradients[0][own], gradients[1][own], scale.grad, None if bias is None else bias.grad)
