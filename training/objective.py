"""The losses of a batch, exact whatever the number of processes and chunks.

    Batch ─ chunks ─ PairModel ─ PairOutputs: image_embeds, text_embeds, logit_scale, sums of caption and router terms
                     (inside DDP, FSDP2,      │
                      torch.compile)          └─ contrastive_loss_over_ranks (all_gather) + caption + router ─ backward

Every term is a sum over rows or tokens, divided by its number in the whole batch over all processes (`Totals`, known
before the forward pass). So 1 process × 32 pairs, 2 × 16, and either in chunks give the same gradient.

GradCache (2101.06983) for chunks: embed all chunks without gradient, take the gradient of the contrastive loss with
respect to the embeddings, then run each chunk again with gradient and backpropagate ⟨embeddings, that gradient⟩. The
second run sees the random numbers of the first, so that dropout is the same in both.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..captioning_mome import start_captions
from ..data.images import PixelScale
from ..inputs_mome import text_tokens
from ..losses_mome import at_least_float32, caption_loss, distillation_loss, router_loss, router_sums
from .batches import Batch
from .contrastive import contrastive_gradients, contrastive_loss_over_ranks, world_size
from .recipe import Recipe

LOSSES = ("loss", "contrastive", "caption", "router", "teacher")  # of `StepLosses`


class PairOutputs(NamedTuple):
    """What one forward pass over pairs gives.

    Attributes:
        image_embeds, text_embeds: (pairs, projection_dim) float32, L2-normalised.
        logit_scale: (), the inverse temperature.
        caption_loss: (), sum over caption tokens; 0 where no captions were asked for.
        assignments: (layers, groups, experts) tokens that went to each expert, without gradient.
        probabilities: (layers, groups, experts), squared_logsumexp, tokens: (layers, groups); see `router_sums`.
        logit_bias: (), of the sigmoid objective, else `None`.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    logit_scale: torch.Tensor
    caption_loss: torch.Tensor
    assignments: torch.Tensor | None
    probabilities: torch.Tensor | None
    squared_logsumexp: torch.Tensor | None
    tokens: torch.Tensor | None
    logit_bias: torch.Tensor | None = None


class PairModel(nn.Module):
    """A captioner's forward pass for training: both embeddings, caption loss and routing of a chunk of pairs.

    Args:
        captioner: a `MomeForConditionalGeneration` or a `CocaForConditionalGeneration`, or peft's wrapper of one.
        label_smoothing: of the caption loss.
        image_dropout: share of the rows whose caption is learnt a second time, without the image.
        captions: whether captions are learnt at all.
        pixel_scale: what makes pixel values of batches that hold uint8 pixels.
    """

    def __init__(
        self,
        captioner: nn.Module,
        label_smoothing: float = 0.0,
        image_dropout: float = 0.0,
        captions: bool = True,
        pixel_scale: PixelScale | None = None,
    ):
        super().__init__()
        self.captioner = captioner
        self._no_split_modules = captioner._no_split_modules  # the unit that FSDP shards
        # Where the `MomeModel` is: peft puts a captioner two modules deeper.
        projection = next(name for name, _ in captioner.named_modules() if name.endswith("model.image_projection"))
        self.embedder_path = projection.rpartition(".")[0]
        self.pixel_scale = pixel_scale
        self.label_smoothing, self.image_dropout, self.captions = label_smoothing, image_dropout, captions

    @property
    def config(self):
        return self.captioner.config

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        valid: torch.Tensor,
        captioned: torch.Tensor,
        embed_only: bool = False,
    ) -> PairOutputs:
        """See `Batch` for shapes. With `embed_only` the caption pass is left out."""
        routed = self.config.experts_per_group > 1
        if pixel_values.dtype == torch.uint8:
            pixel_values = self.pixel_scale(pixel_values)
        # Text, image, caption: `embed_only` draws the same random numbers as far as it goes.
        text = self.captioner.get_text_features(input_ids, attention_mask, output_router_logits=routed)
        caption_sum = at_least_float32(text.pooler_output.new_zeros(()))
        text_mask = text_tokens(self.config, input_ids, attention_mask)[1]
        routing = [("text", text.router_logits, text_mask)]
        if embed_only or not self.captions:
            image = self.captioner.get_image_features(pixel_values, output_router_logits=routed)
            image_embeds = image.pooler_output
            routing += [("image", image.router_logits, None)]
        else:
            labels = caption_labels(input_ids, attention_mask, captioned)
            input_ids, attention_mask, labels = start_captions(self.config, input_ids, attention_mask, labels)
            options = {"image_tokens_in_input": False, "use_cache": False, "output_router_logits": routed}
            image = self.captioner(input_ids, pixel_values, attention_mask, **options)
            image_embeds = image.image_embeds
            caption_sum = caption_sum + self._caption_loss(image.logits, labels)
            routing += _routing_of(image.router_logits, attention_mask)
            if without := round(self.image_dropout * len(input_ids)):
                blind = self.captioner(input_ids[:without], None, attention_mask[:without], **options)
                caption_sum = caption_sum + self._caption_loss(blind.logits, labels[:without])
                routing += _routing_of(blind.router_logits, attention_mask[:without])
        sums = self._routing_sums(routing, valid) if routed else (None,) * 4
        embeds = at_least_float32(image_embeds), at_least_float32(text.pooler_output)
        scale, bias = self._scale_and_bias()
        return PairOutputs(*embeds, scale, caption_sum, *sums, bias)

    def _scale_and_bias(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        model = self.captioner.get_submodule(self.embedder_path)
        scale = at_least_float32(model.logit_scale).exp().reshape(())
        return scale, None if model.logit_bias is None else at_least_float32(model.logit_bias).reshape(())

    def _caption_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return caption_loss(logits, labels, num_items=1, label_smoothing=self.label_smoothing)

    def _routing_sums(self, routing: list, valid: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(layers, groups, …) sums over all passes."""
        totals = []
        for layer in range(self.config.num_hidden_layers):
            for group in self.config.token_groups:
                sums = []
                for name, logits, mask in routing:
                    if name == group and logits is not None:
                        rows = valid[: logits[layer].shape[0], None].expand(-1, logits[layer].shape[1])
                        mask_of_rows = rows if mask is None else rows & mask.bool()
                        sums.append(router_sums(logits[layer], self.config.experts_per_token, mask_of_rows))
                totals.append([torch.stack(each).sum(dim=0) for each in zip(*sums)])
        shape = (self.config.num_hidden_layers, len(self.config.token_groups))
        return tuple(torch.stack(each).unflatten(0, shape) for each in zip(*totals))


def _routing_of(router_logits: tuple[dict, ...] | None, text_mask: torch.Tensor) -> list:
    """The captioner's router logits, a dict for each layer, as (group, logits of each layer, mask)."""
    groups = router_logits[0] if router_logits else ()
    return [
        (group, tuple(layer[group] for layer in router_logits), None if group == "image" else text_mask)
        for group in groups
    ]


def caption_labels(input_ids: torch.Tensor, attention_mask: torch.Tensor, captioned: torch.Tensor) -> torch.Tensor:
    """(pairs, tokens) ids, -100 for padding and for rows whose caption is not to be learnt."""
    return input_ids.masked_fill(~(attention_mask.bool() & captioned[:, None]), -100)


# ------------------------------------------------------------------------------------------------- one step


@dataclass
class Totals:
    """Numbers of the whole batch over all processes.

    Attributes:
        pairs, bad: rows that can and can't be used.
        caption_tokens: tokens that captions predict.
        taught: rows whose text the teacher knows.
    """

    pairs: int
    bad: int
    caption_tokens: int
    taught: int

    @classmethod
    def of(
        cls, batch: Batch, image_dropout: float = 0.0, chunk_size: int | None = None, start_token: bool = True
    ) -> "Totals":
        """`start_token`: whether texts begin with `[BOS]`, which no caption predicts."""
        tokens = 0
        for chunk in batch.chunks(chunk_size):
            labels = caption_labels(chunk.input_ids, chunk.attention_mask, chunk.captioned)
            predicted = (labels[:, int(start_token) :] != -100).sum(dim=1)
            tokens += int(predicted.sum()) + int(predicted[: round(image_dropout * len(chunk))].sum())
        taught = 0 if batch.teacher_embeds is None else int(batch.teacher_embeds.any(dim=1).sum())
        valid = int(batch.valid.sum())
        counts = torch.tensor([valid, len(batch) - valid, tokens, taught], device=batch.valid.device)
        if world_size() > 1:
            distributed.all_reduce(counts)
        return cls(*counts.tolist())


@dataclass
class StepLosses:
    """Losses of one batch, means over the whole batch, and its routing (layers, groups, experts) as token counts.

    `teacher` is 1 − cosine to the teacher's embeddings, 0 without a teacher; `loss` is the weighted sum of the others.
    """

    loss: torch.Tensor
    contrastive: torch.Tensor
    caption: torch.Tensor
    router: torch.Tensor
    teacher: torch.Tensor
    assignments: torch.Tensor | None = None


class RandomState:
    """The random numbers that one run of a chunk sees, so that another run can see them again.

    Args:
        tensors: what the run works on; the generators of their devices count, beside the CPU's.
    """

    def __init__(self, *tensors: torch.Tensor):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    @contextlib.contextmanager
    def replayed(self):
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


def backward(accelerator: Accelerator, model: nn.Module, batch: Batch, recipe: Recipe) -> tuple[StepLosses, Totals]:
    """Adds the gradient of the whole batch's loss to the parameters.

    Args:
        model: `PairModel`, prepared by the accelerator.
        batch: the pairs of this process, on its device.
        recipe: weights of the losses, `chunk_size`.
    """
    config = accelerator.unwrap_model(model).config
    recipe = recipe.with_weights_of(config)
    chunks = batch.chunks(recipe.chunk_size)
    image_dropout = recipe.image_dropout if recipe.caption_weight else 0.0
    totals = Totals.of(batch, image_dropout, recipe.chunk_size, config.text_start_token)
    terms = _Terms(config, recipe, totals)
    if len(chunks) == 1:
        outputs = _run(model, batch)
        losses = terms.of(outputs, batch, _sum_over_ranks(outputs.assignments))
        contrastive = _contrastive(outputs, batch) if recipe.contrastive_weight else losses.contrastive
        loss = losses.loss + recipe.contrastive_weight * contrastive
        accelerator.backward(loss)
        return _mean_over_ranks(replace(losses, loss=loss, contrastive=contrastive)), totals
    return _backward_in_chunks(accelerator, model, batch, chunks, terms, recipe), totals


def _backward_in_chunks(accelerator, model, batch, chunks, terms, recipe) -> StepLosses:
    states, first = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(RandomState(batch.valid))
            first.append(_run(model, chunk, embed_only=not terms.needs_caption_routing))
    assignments = None
    if first[0].assignments is not None:
        assignments = _sum_over_ranks(torch.stack([each.assignments for each in first]).sum(dim=0))
    sums = StepLosses(*(first[0].image_embeds.new_zeros(()) for _ in LOSSES), assignments)
    gradients = None
    if recipe.contrastive_weight:
        embeds = [torch.cat([each[side] for each in first]) for side in (0, 1)]
        sums.contrastive, gradients = contrastive_gradients(
            *embeds, first[0].logit_scale, batch.positive_ids, batch.valid, recipe.chunk_size, first[0].logit_bias
        )
        gradients = [None if each is None else recipe.contrastive_weight * each for each in gradients]
        sums.loss = recipe.contrastive_weight * sums.contrastive
    del first
    start = 0
    for number, (chunk, state) in enumerate(zip(chunks, states)):
        last = number == len(chunks) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with state.replayed():
                outputs = _run(model, chunk)
            losses = terms.of(outputs, chunk, assignments)
            surrogate = losses.loss
            if gradients is not None:
                rows = slice(start, start + len(chunk))
                surrogate = surrogate + (outputs.image_embeds * gradients[0][rows]).sum()
                surrogate = surrogate + (outputs.text_embeds * gradients[1][rows]).sum()
                surrogate = surrogate + outputs.logit_scale * gradients[2] / len(chunks)
                if outputs.logit_bias is not None:
                    surrogate = surrogate + outputs.logit_bias * gradients[3] / len(chunks)
            accelerator.backward(surrogate)
        start += len(chunk)
        for name in ("loss", "caption", "router", "teacher"):
            setattr(sums, name, getattr(sums, name) + getattr(losses, name).detach())
    return _mean_over_ranks(sums)


class _Terms:
    """The caption, router and teacher terms of a chunk, each divided by its number in the whole batch."""

    def __init__(self, config, recipe: Recipe, totals: Totals):
        self.config, self.recipe, self.totals = config, recipe, totals

    @property
    def needs_caption_routing(self) -> bool:
        """The balance loss of a chunk needs the assignments of the whole batch, caption tokens included."""
        return self.config.experts_per_group > 1 and bool(self.recipe.caption_weight)

    def of(self, outputs: PairOutputs, batch: Batch, assignments: torch.Tensor | None) -> StepLosses:
        caption = outputs.caption_loss * world_size() / max(self.totals.caption_tokens, 1)
        router = caption.new_zeros(())
        if assignments is not None:
            # Assignments are twice per token of a text group that serves captions too; both sums count both.
            tokens = assignments.sum(dim=-1) / self.config.experts_per_token / world_size()
            router = router_loss(self.config, assignments, outputs.probabilities, outputs.squared_logsumexp, tokens)
        teacher = caption.new_zeros(())
        if batch.teacher_embeds is not None:
            distance = distillation_loss(outputs.text_embeds, batch.teacher_embeds)
            teacher = distance * world_size() / max(self.totals.taught, 1)
        loss = self.recipe.caption_weight * caption + router + self.recipe.teacher_weight * teacher
        return StepLosses(loss, caption.new_zeros(()), caption, router, teacher, assignments)


def _run(model: nn.Module, batch: Batch, embed_only: bool = False) -> PairOutputs:
    inputs = batch.pixel_values, batch.input_ids, batch.attention_mask, batch.valid, batch.captioned
    return model(*inputs, embed_only=embed_only)


def _contrastive(outputs: PairOutputs, batch: Batch) -> torch.Tensor:
    return contrastive_loss_over_ranks(*outputs[:3], batch.positive_ids, batch.valid, outputs.logit_bias)


def _sum_over_ranks(assignments: torch.Tensor | None) -> torch.Tensor | None:
    if assignments is None or world_size() == 1:
        return assignments
    assignments = assignments.clone()
    distributed.all_reduce(assignments)
    return assignments


def _mean_over_ranks(losses: StepLosses) -> StepLosses:
    """Every process's share is already times the number of processes."""
    values = torch.stack([getattr(losses, name) for name in LOSSES]).detach().float()
    if world_size() > 1:
        distributed.all_reduce(values)
        values = values / world_size()
    return StepLosses(*values.unbind(), losses.assignments)
