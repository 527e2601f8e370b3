"""MoME: one mixture-of-modality-experts transformer that embeds, captions, classifies and searches images and text.

`import mome` registers its classes with the Auto classes of transformers, so that `AutoModel.from_pretrained(path)`
needs no `trust_remote_code`.
"""

import logging
import os

from .commands import settle

settle()  # before the imports below, which take seconds

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top it demands torchvision
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.logging import get_verbosity

from .configuration_coca import COCA_SIZES, CocaConfig
from .configuration_mome import MOME_SIZES, MomeConfig
from .families import FAMILIES
from .guidance_mome import MomeGenerationConfig
from .modeling_coca import CocaForConditionalGeneration, CocaModel
from .modeling_mome import MomeForConditionalGeneration, MomeModel
from .pictures_mome import MomeImageProcessor
from .pipeline_mome import MomeImageCaptioningPipeline, MomeZeroShotImageClassificationPipeline
from .processing_mome import MomeProcessor

if os.environ.get("TRANSFORMERS_VERBOSITY"):  # holds for what this package logs, too
    logging.getLogger(__name__).setLevel(get_verbosity())
if __name__ == "mome":  # and not the name of the checkout's folder, by which pytest imports this file as well
    for family in FAMILIES.values():
        AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
        AutoModel.register(family.config, family.model, exist_ok=True)
        AutoModelForZeroShotImageClassification.register(family.config, family.model, exist_ok=True)
        AutoModelForImageTextToText.register(family.config, family.captioner, exist_ok=True)
        AutoImageProcessor.register(family.config, slow_image_processor_class=MomeImageProcessor, exist_ok=True)
        AutoProcessor.register(family.config, MomeProcessor, exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(
        "image-captioning", MomeImageCaptioningPipeline, pt_model=AutoModelForImageTextToText
    )
    PIPELINE_REGISTRY.register_pipeline(
        "open-vocabulary-image-classification",
        MomeZeroShotImageClassificationPipeline,
        pt_model=AutoModelForZeroShotImageClassification,
    )

__version__ = "0.1.0"
__all__ = [
    "COCA_SIZES",
    "MOME_SIZES",
    "CocaConfig",
    "CocaForConditionalGeneration",
    "CocaModel",
    "MomeConfig",
    "MomeForConditionalGeneration",
    "MomeGenerationConfig",
    "MomeImageCaptioningPipeline",
    "MomeImageProcessor",
    "MomeModel",
    "MomeProcessor",
    "MomeZeroShotImageClassificationPipeline",
]
