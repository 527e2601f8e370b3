"""transformers' own tests of the installed version (see `peer_suite.py`) against CoCa, as `test_peer_suite.py`."""

import unittest
from fnmatch import fnmatchcase
from unittest.mock import mock_open, patch

import test_peer_suite as mome_suite
import torch
from transformers import PreTrainedModel
from transformers.testing_utils import torch_device

import peer_suite
from models import TINY_COCA
from mome import CocaConfig, CocaForConditionalGeneration, CocaModel
from mome.towers_coca import CocaPreTrainedModel

modeling = peer_suite.load("test_modeling_common")
configuration = peer_suite.load("test_configuration_common")

NOTHING_ROUTED = "nothing is routed"
OF_THE_MODEL = "a captioner's features are those of its CocaModel, which has tests of its own"
SKIPPED_HERE = {
    "*.test_model_forward_default_config_values": "the default special tokens are the last ids of CLIP's vocabulary",
    "CaptionTest.test_get_*_features_*": OF_THE_MODEL,
    "PairTest.test_attention_outputs": mome_suite.TWO_PASSES,
    "PairTest.test_hidden_states_output": mome_suite.TWO_PASSES,
    "PairTest.test_retain_grad_hidden_states_attentions": mome_suite.TWO_PASSES,
}
SKIPPED_BY_TRANSFORMERS = {
    "*.test_eager_matches_batched_and_grouped_inference_*": NOTHING_ROUTED,
    "*.test_moe_models_record_router_logits": NOTHING_ROUTED,
    "*.test_output_router_logits_from_config": NOTHING_ROUTED,
}
EXPECTED_SKIPS = {**SKIPPED_HERE, **SKIPPED_BY_TRANSFORMERS, **mome_suite.SKIPPED_BY_TRANSFORMERS}

SIZES = {**TINY_COCA, "image_size": 16, "initializer_range": 0.02, "pad_token_id": 0, "filler_token_id": 5}
SIZES |= {"vision_hidden_size": 32, "vision_num_attention_heads": 4, "decoder_num_attention_heads": 4}


class TextTester(mome_suite.MomeTester):
    vocab_size = SIZES["vocab_size"]
    hidden_size = SIZES["hidden_size"]
    num_attention_heads = SIZES["text_num_attention_heads"]
    num_hidden_layers = SIZES["text_num_hidden_layers"]
    seq_length = mome_suite.MomeTester.text_length + 2  # one more filler token, and [CLS]

    def __init__(self):
        super().__init__({})

    def get_config(self) -> CocaConfig:
        return CocaConfig(**SIZES)

    def images(self) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.rand(self.batch_size, 3, 16, 16, device=torch_device)}


class PairTester(TextTester):
    is_training = True

    def inputs(self):
        return {**self.texts(), **self.images()}


class CaptionTester(PairTester):
    seq_length = mome_suite.MomeTester.text_length
    num_hidden_layers = 2  # of the text encoder and the decoder together

    def get_config(self):
        return CocaConfig(**{**SIZES, "text_num_hidden_layers": 1, "decoder_num_hidden_layers": 1})


class CocaSuite(mome_suite.MomeSuite):
    inputs_of: type[TextTester]

    def setUp(self):
        for pattern, reason in SKIPPED_HERE.items():
            if fnmatchcase(f"{type(self).__name__}.{self._testMethodName}", pattern):
                self.skipTest(reason)
        torch.manual_seed(0)
        self.model_tester = self.inputs_of()

    def test_can_init_all_missing_weights(self):
        anything = classmethod(PreTrainedModel.from_pretrained.__func__)
        with (
            patch.object(modeling, "open", mock_open(read_data="# Copyright 2026"), create=True),
            patch.object(CocaPreTrainedModel, "from_pretrained", anything),
        ):
            modeling.ModelTesterMixin.test_can_init_all_missing_weights(self)


class TextTest(CocaSuite, unittest.TestCase):
    """A text alone."""

    inputs_of = TextTester
    all_model_classes = (CocaModel,)


class PairTest(CocaSuite, unittest.TestCase):
    """Images and texts in one space."""

    inputs_of = PairTester
    all_model_classes = (CocaModel,)
    additional_model_inputs = ["pixel_values"]
    _prepare_for_class = mome_suite.PairSuite._prepare_for_class


class CaptionTest(CocaSuite, modeling.GenerationTesterMixin, unittest.TestCase):
    """Captions."""

    inputs_of = CaptionTester
    all_model_classes = (CocaForConditionalGeneration,)
    additional_model_inputs = ["pixel_values"]
    _prepare_for_class = mome_suite.CaptionSuite._prepare_for_class

    def test_causal_lm_loss_honors_shift_labels(self):
        name = CocaForConditionalGeneration.__name__
        with patch.dict(modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, coca=name):
            modeling.ModelTesterMixin.test_causal_lm_loss_honors_shift_labels(self)


class ConfigTest(unittest.TestCase):
    def test_config(self):
        tester = configuration.ConfigTester(
            self, config_class=CocaConfig, common_properties=["hidden_size", "vocab_size", "projection_dim"], **SIZES
        )
        tester.run_common_tests()
