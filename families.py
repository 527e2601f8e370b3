"""The model families of the package, by the `model_type` of their configs."""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_coca import CocaConfig
from .configuration_mome import MomeConfig
from .modeling_coca import CocaForConditionalGeneration, CocaModel
from .modeling_mome import MomeForConditionalGeneration, MomeModel


@dataclass(frozen=True)
class Family:
    """What a checkpoint of one family is loaded with.

    Attributes:
        config: its config class.
        model: embeds images and texts.
        captioner: captions as well; its `model` is one of the former.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    captioner: type[PreTrainedModel]


FAMILIES: dict[str, Family] = {
    "mome": Family(MomeConfig, MomeModel, MomeForConditionalGeneration),
    "coca": Family(CocaConfig, CocaModel, CocaForConditionalGeneration),
}
FAMILY_NAMES = " or ".join(map(repr, FAMILIES))

__all__ = ["FAMILIES", "FAMILY_NAMES", "Family"]
