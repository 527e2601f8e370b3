"""The losses of a batch that was made on the device.

    pictures, texts, captions ─ IconPairs ─ PairStates ─ Losses.of: contrastive + caption + teacher + router
                                (the model's own passes)

Every process compares all pictures with all texts: the gather has the exact gradient, and the mean of the processes'
gradients is that of the whole batch. Numbers to divide by are tensors: nothing here waits for the device.
"""

from typing import NamedTuple

import torch
from torch import distributed, nn

from ...icons.phrases import Texts, positives
from ...icons.tensors import IconTensors
from ...losses_mome import caption_loss, contrastive_loss, distillation_loss, router_loss_of_passes
from ..contrastive import all_gather, world_size

TEXT_SCALE = 20.0  # inverse temperature between texts and their teacher


class PairStates(NamedTuple):
    """What the forward passes over a batch give.

    Attributes:
        image_embeds, text_embeds: (rows, projection_dim) float32, L2-normalised.
        logit_scale: (), the inverse temperature.
        caption_loss, caption_tokens: (), sum over the tokens that captions predict, and their number.
        router_loss: (), 0 for a model without routers.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    logit_scale: torch.Tensor
    caption_loss: torch.Tensor
    caption_tokens: torch.Tensor
    router_loss: torch.Tensor


class StepLosses(NamedTuple):
    """Means over the batch, (): `total` is the weighted sum of the others."""

    total: torch.Tensor
    contrastive: torch.Tensor
    caption: torch.Tensor
    teacher: torch.Tensor
    image_teacher: torch.Tensor
    router: torch.Tensor


class IconPairs(nn.Module):
    """A captioner's passes over pictures, the texts that they are found by, and captions.

    Args:
        captioner: a `MomeForConditionalGeneration`.
        label_smoothing: of the caption loss.
        image_dropout: share of the rows whose caption is learnt a second time, without its image.
        captions: whether captions are learnt at all.
    """

    def __init__(self, captioner: nn.Module, label_smoothing: float, image_dropout: float, captions: bool):
        super().__init__()
        self.captioner = captioner
        # The passes hand out router logits unasked: a keyword would reach every layer, for a compiler to guard.
        captioner.config.output_router_logits = captioner.config.experts_per_group > 1
        self.label_smoothing, self.image_dropout, self.captions = label_smoothing, image_dropout, captions

    def forward(
        self, pixel_values: torch.Tensor, kept_patches: torch.Tensor | None, texts: Texts, captions: Texts
    ) -> PairStates:
        """pixel_values (rows, channels, height, width), kept_patches (rows, kept) or `None`, texts of them."""
        model, config = self.captioner.model, self.captioner.config
        routed = config.experts_per_group > 1
        text = model.get_text_features(texts.input_ids, texts.attention_mask)
        image = model.image_pass(pixel_values, kept_patches=kept_patches, return_key_values=self.captions)
        text_routing, text_mask = text.router_logits, texts.attention_mask
        loss = tokens = text.pooler_output.new_zeros((), dtype=torch.float32)
        image_embeds = None
        if self.captions:
            captioned, loss, tokens = self._caption(pixel_values, image, captions)
            image_embeds = captioned.image_embeds
            if routed:  # the text experts serve both passes: their tokens are those of both
                pairs = zip(text_routing, captioned.router_logits)
                text_routing = tuple(torch.cat([one, other["text"]], dim=1) for one, other in pairs)
                text_mask = torch.cat([text_mask, captions.attention_mask], dim=1)
        routing = (image.router_logits, None), (text_routing, text_mask)
        router = router_loss_of_passes(config, *routing) if routed else torch.zeros_like(loss)
        if image_embeds is None:
            image_embeds = model.project_image(image.last_hidden_state)
        scale = model.logit_scale.float().exp()
        return PairStates(image_embeds.float(), text.pooler_output.float(), scale, loss, tokens, router)

    def _caption(self, pixel_values, image, captions: Texts):
        """The caption pass over the image, and the loss of it and of the captions without an image.

        Captions are padded on the right and no token sees what is behind it: they need no mask.
        """
        options = {"image_tokens_in_input": False, "use_cache": False}
        labels, predicted = _labels(captions)
        captioned = self.captioner(captions.input_ids, pixel_values, image_outputs=image, **options)
        loss, tokens = self._sum(captioned.logits, labels), predicted.sum()
        without = round(self.image_dropout * len(labels))
        if without:
            blind = self.captioner(captions.input_ids[:without], None, **options)
            loss, tokens = loss + self._sum(blind.logits, labels[:without]), tokens + predicted[:without].sum()
        return captioned, loss, tokens

    def _sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return caption_loss(logits, labels, num_items=1, label_smoothing=self.label_smoothing)


def _labels(captions: Texts) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, tokens) ids, -100 for padding; (rows,), how many tokens of each are predicted: all but `[BOS]`."""
    labels = captions.input_ids.masked_fill(captions.attention_mask == 0, -100)
    return labels, captions.attention_mask.sum(dim=1) - 1


class Weights(NamedTuple):
    """What each loss counts beside the contrastive one; a number, or a tensor () on the device."""

    caption: float | torch.Tensor
    teacher: float
    image_teacher: float


def pair_losses(
    states: PairStates, icons: IconTensors, teacher: torch.Tensor, rows: torch.Tensor, texts: Texts, weights: Weights
) -> StepLosses:
    """The losses of a batch.

    Args:
        states: of this process's rows.
        icons: tells which texts are true of which pictures: those are no negatives.
        teacher: (texts of the data set, projection_dim), rows of zeros where it knows nothing.
        rows: (rows,) int64, the pictures of this process.
        texts: what they are found by.
    """
    all_rows, all_texts = all_gather(rows), all_gather(texts.text)
    logits = states.logit_scale * all_gather(states.image_embeds) @ all_gather(states.text_embeds).T
    contrastive = contrastive_loss(logits, positives(icons, all_rows, all_texts))
    caption = _mean(states.caption_loss, states.caption_tokens)
    known = teacher[texts.text] * texts.bare[:, None]
    teaching = _mean(distillation_loss(states.text_embeds, known), known.any(dim=1).sum())
    known = teacher[icons.name[rows].long()]
    image_teaching = _mean(distillation_loss(states.image_embeds, known), known.any(dim=1).sum())
    total = contrastive + weights.caption * caption + states.router_loss
    total = total + weights.teacher * teaching + weights.image_teacher * image_teaching
    return StepLosses(total, contrastive, caption, teaching, image_teaching, states.router_loss)


def text_losses(captioner: nn.Module, texts: Texts, teacher: torch.Tensor, captions: bool) -> StepLosses:
    """The losses of texts without pictures: near the teacher's embedding, nearest to it among all, and to be said.

    Args:
        captioner: a `MomeForConditionalGeneration`.
        texts: bare texts.
        teacher: (texts of the data set, projection_dim); it knows all of `texts`.
        captions: whether a quarter of them are learnt as captions.
    """
    embeds = captioner.get_text_features(texts.input_ids, texts.attention_mask).pooler_output.float()
    known = teacher[texts.text]
    teaching = distillation_loss(embeds, known) / len(embeds)
    contrastive = contrastive_loss(TEXT_SCALE * embeds @ known.T, texts.text[:, None] == texts.text[None])
    caption = embeds.new_zeros(())
    if captions:
        some = len(embeds) // 4
        labels, predicted = _labels(texts)
        blind = captioner(texts.input_ids[:some], None, image_tokens_in_input=False, use_cache=False)
        caption = caption_loss(blind.logits, labels[:some], num_items=predicted[:some].sum().clamp(min=1))
    none = embeds.new_zeros(())
    return StepLosses(teaching + 0.2 * contrastive + 0.3 * caption, contrastive, caption, teaching, none, none)


def _mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """This process's share of the mean over all processes, times their number; the count stays on the device."""
    if world_size() > 1:
        count = count.clone()
        distributed.all_reduce(count)
    return total * world_size() / count.clamp(min=1)


def average_gradients(parameters: list[nn.Parameter]):
    """The mean of the processes' gradients, in one message; the same parameters have one everywhere."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])
