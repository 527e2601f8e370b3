"""Every loss, once: pure functions of tensors, without communication between processes.

- `contrastive_loss`: multi-positive InfoNCE of a batch; `info_nce` is one direction of it, row by row;
- `sigmoid_loss`: each pair for itself, match or no match; `sigmoid_terms` of it, row by row;
- `caption_loss`: next-token cross-entropy, as a mean or as a sum over a number of tokens;
- `label_share`: what a part of a batch counts for, where gradients of parts are added up;
- `router_loss`: balance loss and z-loss of the experts of a group, from sums over its tokens (`router_sums`);
- `distillation_loss`: distance to the embeddings of a teacher.

The joint loss of `MomeForConditionalGeneration` is made of them, and so is that of a training run over many processes,
which adds the gathering and the totals (`training/objective.py`).
"""

import torch
from torch.nn import functional as F


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the precision of losses: half precision becomes float32, the rest stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ------------------------------------------------------------------------------------------ images against texts


def same_caption(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(texts, tokens) → (texts, texts) bool: which texts of a batch are equal, padding aside."""
    if attention_mask is not None:
        input_ids = input_ids.masked_fill(attention_mask == 0, -1)
    return (input_ids[:, None, :] == input_ids[None, :, :]).all(dim=-1)


def contrastive_loss(logits_per_image: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Multi-positive InfoNCE, mean of both directions (UniCL, 2204.03610, eq. 2–4).

    With one positive per row it is the loss of CLIP. Several positives share the target mass equally, so that an
    equal caption in the batch is no false negative.

    Args:
        logits_per_image: (images, texts), cosine times inverse temperature.
        positives: (images, texts) bool, at least one per row and column.

    Returns:
        (), float32 at least.
    """
    logits = at_least_float32(logits_per_image)
    return (info_nce(logits, positives).mean() + info_nce(logits.T, positives.T).mean()) / 2


def info_nce(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row with its positives as targets, in equal shares; 0 for a row that has none.

    Args:
        logits: (rows, columns).
        positives: (rows, columns) bool.

    Returns:
        (rows,)
    """
    targets = positives.to(logits.dtype)
    targets = targets / targets.sum(dim=1, keepdim=True).clamp(min=1)
    return F.cross_entropy(logits, targets, reduction="none")


def sigmoid_loss(logits_per_image: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """−Σ_ij log σ(z_ij logits_ij) / images, z_ij = 1 for positives and −1 for other pairs (2303.15343, algorithm 1).

    Several positives of an image all count.

    Args:
        logits_per_image: (images, texts), cosine times inverse temperature, plus the bias.
        positives: (images, texts) bool.

    Returns:
        (), float32 at least.
    """
    return sigmoid_terms(at_least_float32(logits_per_image), positives).sum(dim=1).mean()


def sigmoid_terms(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """−log σ(z logits) of every pair, (rows, columns); arguments as those of `sigmoid_loss`."""
    return -F.logsigmoid(torch.where(positives, logits, -logits))


def pair_loss(config, logits_per_image: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """`contrastive_loss` or `sigmoid_loss`, as the `contrastive_objective` of a `MomeConfig` says."""
    loss = sigmoid_loss if config.contrastive_objective == "sigmoid" else contrastive_loss
    return loss(logits_per_image, positives)


def pair_scores(config, logits_per_image: torch.Tensor) -> torch.Tensor:
    """Probabilities (images, texts): of each text among all, or of each pair to match, by `contrastive_objective`."""
    if config.contrastive_objective == "sigmoid":
        return logits_per_image.sigmoid()
    return logits_per_image.softmax(dim=1)


def distillation_loss(text_embeds: torch.Tensor, teacher_embeds: torch.Tensor) -> torch.Tensor:
    """Sum of 1 − cosine over the rows that the teacher knows, ().

    Args:
        text_embeds: (texts, dimension), L2-normalised.
        teacher_embeds: (texts, dimension), L2-normalised or zero.
    """
    known = teacher_embeds.square().sum(dim=1) > 0.5
    return ((1 - (text_embeds * teacher_embeds).sum(dim=1)) * known).sum()


# ------------------------------------------------------------------------------------------------------ captions


def caption_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items: int | torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of each token of a caption, predicted from the positions before it.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens) int64, in line with `logits`; -100 is ignored.
        num_items: the sum over tokens is divided by it: 1 for the sum itself. `None`: the mean over the tokens, 0 if
            there is none to predict.
        shift_labels: (batch, tokens), what each position predicts, in place of the next label.
        label_smoothing: share of the target mass that all tokens of the vocabulary get.

    Returns:
        (), float32 at least.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    shift_labels = shift_labels.flatten().to(logits.device)
    loss = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1), shift_labels, reduction="sum", label_smoothing=label_smoothing
    )
    return loss / ((shift_labels != -100).sum().clamp(min=1) if num_items is None else num_items)


def label_share(
    labels: torch.Tensor, num_items: int | torch.Tensor, shift_labels: torch.Tensor | None = None
) -> torch.Tensor:
    """The share of its labels that a part of a batch holds, (): those of all parts add up to 1.

    Whoever adds up gradients of parts that each have a mean for a loss weights them so: however a batch is cut, the
    sum is a mean over all of it. Labels are counted as transformers' `Trainer` does for models that predict the next
    token: without the first one of each row.

    Args:
        labels, shift_labels: as in `caption_loss`.
        num_items: labels of the whole batch, on all devices if losses are added up over them.
    """
    counted = labels[:, 1:] if shift_labels is None else shift_labels
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(counted.device).reshape(())
    return (counted != -100).sum() / num_items


# ------------------------------------------------------------------------------------------------------- routing


def router_sums(
    logits: torch.Tensor, experts_per_token: int, token_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the balance and z-losses are made of, as sums over the tokens of one group in one layer.

    Sums can be added up over parts of a batch and over processes; `router_losses` makes losses of them.

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
    probabilities = (logits.softmax(dim=-1) * mask[:, None]).sum(dim=0)
    return assignments, probabilities, (logits.logsumexp(dim=-1).square() * mask).sum(), mask.sum()


def router_losses(
    assignments: torch.Tensor, probabilities: torch.Tensor, squared_logsumexp: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balance loss and z-loss from the sums of `router_sums`; leading dimensions (layers, groups, …) are kept.

    The balance loss is E Σ_e f_e P_e (Switch, 2101.03961, eq. 4; per modality: LIMoE, 2206.02770) with f_e the share
    of the assignments that expert e got and P_e its mean probability: 1 when balanced. The z-loss is the mean of
    logsumexp(logits)² (ST-MoE, 2202.08906, eq. 5).
    """
    share = assignments / assignments.sum(dim=-1, keepdim=True).clamp(min=1)
    tokens = tokens.clamp(min=1)
    balance = assignments.shape[-1] * (share * probabilities).sum(dim=-1) / tokens
    return balance, squared_logsumexp / tokens


def router_loss(config, *sums: torch.Tensor) -> torch.Tensor:
    """Both losses of `router_losses`, weighted by the config: mean over layers, sum over groups, ().

    Args:
        config: a `MomeConfig`.
        sums: those of `router_sums`, of one layer and group or of several along leading dimensions.
    """
    balance, z_loss = router_losses(*sums)
    weighted = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss
    return weighted.sum() / config.num_hidden_layers


def router_loss_of_passes(
    config, *passes: tuple[tuple[torch.Tensor, ...] | None, torch.Tensor | None]
) -> torch.Tensor | float:
    """`router_loss` of some passes, over the tokens of this process.

    Args:
        config: a `MomeConfig`.
        passes: of one group each: router logits per layer (batch, tokens, experts), and the tokens' mask.

    Returns:
        A scalar, 0 for a model without routers.
    """
    total = 0.0
    for router_logits, token_mask in passes:
        for logits in router_logits or ():
            total = total + router_loss(config, *router_sums(logits, config.experts_per_token, token_mask))
    return total


def joined_passes(
    *passes: tuple[tuple[torch.Tensor, ...] | None, torch.Tensor | None],
) -> tuple[tuple[torch.Tensor, ...] | None, torch.Tensor | None]:
    """Passes of one group as one, for `router_loss_of_passes`: the tokens of the first, then those of the next."""
    if any(router_logits is None for router_logits, _ in passes):
        return None, None
    mask = None
    if any(mask is not None for _, mask in passes):
        mask = torch.cat([logits[0].new_ones(logits[0].shape[:2]) if m is None else m for logits, m in passes], dim=1)
    return tuple(torch.cat(layer, dim=1) for layer in zip(*(logits for logits, _ in passes))), mask


__all__ = [
    "at_least_float32",
    "caption_loss",
    "contrastive_loss",
    "distillation_loss",
    "info_nce",
    "joined_passes",
    "label_share",
    "pair_loss",
    "pair_scores",
    "router_loss",
    "router_loss_of_passes",
    "router_losses",
    "router_sums",
    "same_caption",
    "sigmoid_loss",
    "sigmoid_terms",
]
