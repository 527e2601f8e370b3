"""What makes a step fast on a GPU; each is an option of the recipe, and leaves what is computed as it is.

- all experts of a group side by side as one matrix product: no sort of the tokens, no count that the host waits for;
- ids and masks of our own making are not looked at;
- the stem's convolutions with channels last, as the tensor cores want them;
- states between the layers, and so the inputs of their norms, in bfloat16;
- layers and stem compiled one by one: their elementwise parts become few kernels, and the first step waits seconds.
"""

import torch
from torch import nn

from ...modeling_mome import MomeForConditionalGeneration


def prepare(
    captioner: MomeForConditionalGeneration,
    experts_implementation: str | None = None,
    channels_last: bool = False,
    half_states: bool = False,
    compile_layers: bool = False,
    look_at_values: bool = False,
):
    """Makes a captioner fast for training, in place.

    Args:
        captioner: on its device.
        experts_implementation: as `from_pretrained` takes it; `None`: as it is.
        channels_last: memory format of the stem.
        half_states: bfloat16 states between the layers; only under autocast to bfloat16.
        compile_layers: compile the encoder's layers and the stem.
        look_at_values: see `MomeModel.looks_at_values`.
    """
    model = captioner.model
    model.looks_at_values = look_at_values
    if experts_implementation is not None and captioner.config.experts_per_group > 1:
        captioner.set_experts_implementation(experts_implementation)
    if channels_last:
        model.image_embedding.patch_embedding.to(memory_format=torch.channels_last)
    if half_states:
        for embedding in (model.image_embedding, model.text_embedding):
            embedding.register_forward_hook(_in_bfloat16)
    if compile_layers:
        # Batches, kept patches and texts differ in length: one graph for all of them, not one for each.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for layer in model.encoder.layers:
            layer.compile(dynamic=True)
        stem = model.image_embedding.patch_embedding
        stem.forward = torch.compile(_one_by_one(stem), dynamic=True)


def _one_by_one(stem: nn.Module):
    """What `nn.Sequential` does, as a function that torch.compile looks into: it skips frames of `torch.nn`."""
    if not isinstance(stem, nn.Sequential):
        return stem.forward

    def forward(pixel_values: torch.Tensor) -> torch.Tensor:
        for module in stem:
            pixel_values = module(pixel_values)
        return pixel_values

    return forward


def _in_bfloat16(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.to(torch.bfloat16)
