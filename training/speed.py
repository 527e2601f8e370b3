"""How fast a run is: pairs per second, and how much of the device's matrix-product rate the model uses."""

import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from ..configuration_mome import MomeConfig
from ..modeling_mome import MomeForConditionalGeneration
from .objective import PairModel


def flops_per_pair(captioner: nn.Module, tokens: int, captions: bool, image_dropout: float, pairs: int = 2) -> float:
    """FLOPs of a training step per pair, forward and backward, counted during one small step.

    Routed experts are counted as dense ones with as many active parameters: the counter can't see into them.

    Args:
        captioner: the model; its gradients are cleared, and the random generators stay as they were.
        tokens: length of the texts.
        captions, image_dropout: see `PairModel`.
        pairs: of the small step.
    """
    config, device = captioner.config, captioner.device
    with torch.random.fork_rng():
        if config.experts_per_group > 1:
            captioner = MomeForConditionalGeneration(_dense(config)).to(device)
        model = PairModel(captioner.train(), 0.0, image_dropout, captions)
        pixels = torch.zeros(pairs, config.num_channels, config.image_size, config.image_size, device=device)
        ids = torch.zeros(pairs, tokens, dtype=torch.long, device=device)
        # The counter does not know the CPU's fused attention kernel: plain products instead.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            every_row = torch.ones_like(ids[:, 0], dtype=torch.bool)
            outputs = model(pixels, ids, torch.ones_like(ids), every_row, every_row)
            (outputs.image_embeds.sum() + outputs.text_embeds.sum() + outputs.caption_loss).backward()
    captioner.zero_grad()
    captioner.eval()
    return counter.get_total_flops() / pairs


def _dense(config: MomeConfig) -> MomeConfig:
    """The config of a dense model with the active parameters of a routed one."""
    inner = config.expert_intermediate_size or config.intermediate_size
    dense = {"experts_per_group": 1, "experts_per_token": 1, "expert_intermediate_size": None, "shared_expert": False}
    dense["intermediate_size"] = inner * (config.experts_per_token + config.shared_expert)
    own = {name: getattr(config, name) for name in MomeConfig.__annotations__}
    return MomeConfig(**own | dense)


def image_sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Tokens of an image, width, and inner width of the feed-forwards that they go through."""
    if config.model_type == "coca":
        return config.grid_size**2 + 1, config.vision_hidden_size, config.vision_intermediate_size
    return config.num_image_tokens, config.hidden_size, config.intermediate_size


def gemm_rate(rows: int, width: int, inner: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the trunk's widest matrix product, (rows, width) × (width, inner); the best call in 0.3 seconds."""
    inputs = torch.ones(rows, width, device=device, dtype=dtype)
    weight = torch.ones(inner, width, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + 0.3
    with torch.no_grad():
        while time.perf_counter() < end:
            start = time.perf_counter()
            F.linear(inputs, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2 * rows * width * inner / best


class Speed:
    """Pairs per second, and the model's FLOP/s as a share of the FLOP/s of a matrix product of its own shape.

    Args:
        batch_size: pairs of a step over all processes.
        flops: FLOPs of one pair.
        gemm: FLOP/s of matrix products on all devices together.
        step: steps done so far.
    """

    def __init__(self, batch_size: int, flops: float, gemm: float, step: int):
        self.batch_size, self.flops, self.gemm = batch_size, flops, gemm
        self.restart(step)

    def restart(self, step: int):
        """Starts the clock anew, so that a checkpoint or an evaluation is not counted."""
        self.step, self.time = step, time.perf_counter()

    def since_last(self, step: int) -> dict[str, float]:
        """Figures of the steps since the last call or `restart`."""
        rate = (step - self.step) * self.batch_size / (time.perf_counter() - self.time)
        self.restart(step)
        return {"pairs_per_s": rate, "share_of_gemm": rate * self.flops / self.gemm}
