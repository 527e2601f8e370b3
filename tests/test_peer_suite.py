"""transformers' own tests of the installed version (see `peer_suite.py`) against MoME.

Three ways to call the models × the architectures, the config, the processor. What does not apply is listed with its
reason in `EXPECTED_SKIPS`; `conftest.py` makes any other skip a failure.
"""

import copy
import unittest
from fnmatch import fnmatchcase
from unittest.mock import Mock, mock_open, patch

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, modeling_utils
from transformers.testing_utils import torch_device

import peer_suite
from builders import WORDS, build_processor, build_tokenizer
from mome import MomeConfig, MomeForConditionalGeneration, MomeModel, MomeProcessor
from mome.modeling_mome import MomePreTrainedModel

modeling = peer_suite.load("test_modeling_common")
configuration = peer_suite.load("test_configuration_common")
processing = peer_suite.load("test_processing_common")

ACCELERATOR = "needs an accelerator, several, or a library for one"
FLAT_CONFIG = "the config has no sub-configs"
NO_ROTARY = "positions are learned, not rotary"
NO_TENSOR_PARALLEL = "there is no tensor parallel plan"
NO_RENAMED_KEYS = "checkpoints are saved under the names of the model's own parameters"
TWO_PASSES = "with images and texts, states are in image_model_output and text_model_output"
JOINED = "states of image and text are joined for the output, the loss comes from the parts"
ONE_EXPERT = "with one expert per group nothing is routed"
NO_LOSS = "a text alone has no loss"
NO_TEMPLATE = "the processor has no chat template"
NO_PLACEHOLDERS = "the processor puts no image tokens into the text"
NO_CACHE = "embeddings need no cache"
OWN_CACHE = "the cache is a MomeCache; tests/test_generation.py calls with both of its names"
IMAGES_AND_TEXTS = "the processor takes images and texts, no video and no audio"

# {pattern of Class.test: reason}. These skip themselves …
SKIPPED_BY_TRANSFORMERS = {
    "*CaptionTest.test_bc_cache_name_forward": OWN_CACHE,
    "*.test_bc_cache_name_forward": NO_CACHE,
    "*.test_flash_attn_*": ACCELERATOR,
    "*.test_flex_attention_with_grads": ACCELERATOR,
    "*.test_*_with_deepspeed*": ACCELERATOR,
    "*.test_disk_offload_*": ACCELERATOR,
    "*.test_cpu_offload": ACCELERATOR,
    "*.test_model_parallelism": ACCELERATOR,
    "*.test_can_load_with_device_context_manager": ACCELERATOR,
    "*.test_can_load_with_global_device_set": ACCELERATOR,
    "*.test_sdpa_can_dispatch_on_flash": ACCELERATOR,
    "*.test_sdpa_can_compile_dynamic": ACCELERATOR,
    "*.test_torch_compile_for_training": ACCELERATOR,
    "*.test_kernels_can_load_without_crashing": ACCELERATOR,
    "*.test_*_composite_model*": FLAT_CONFIG,
    "*.test_internal_model_config_and_subconfig_are_same": FLAT_CONFIG,
    "*.test_model_rope_*": NO_ROTARY,
    "*.test_vision_axial_rope": NO_ROTARY,
    "*.test_tp_plan_matches_params": NO_TENSOR_PARALLEL,
    "*.test_tied_head_has_a_tp_plan_entry": NO_TENSOR_PARALLEL,
    "*.test_reverse_loading_mapping": NO_RENAMED_KEYS,
    "*.test_can_load_from_already_mapped_keys": NO_RENAMED_KEYS,
    "*.test_keep_in_fp32_modules*": "no module is kept in fp32",
    "*.test_sliding_window_mask": "attention has no sliding window",
    "*.test_resize_position_vector_embeddings": "position tables belong to the image and text sizes of the config",
    "*.test_encoder_decoder_loss_no_double_shift": "there is one trunk, no encoder and decoder",
    "*TextTest.test_causal_lm_loss_honors_shift_labels": "MomeModel has no language modelling head",
    "*PairTest.test_causal_lm_loss_honors_shift_labels": "MomeModel has no language modelling head",
    "*TextTest.test_inputs_embeds": "MomeModel takes input_ids only",
    "*PairTest.test_inputs_embeds": "MomeModel takes input_ids only",
    "*TextTest.test_training*": NO_LOSS,
    "*TextTest.test_enable_input_require_grads_with_gradient_checkpointing": NO_LOSS,
    "ProcessorTest.test_*_videos": IMAGES_AND_TEXTS,
    "ProcessorTest.test_*_audio": IMAGES_AND_TEXTS,
    "ProcessorTest.test_chat_template_*": NO_TEMPLATE,
    "ProcessorTest.test_apply_chat_template_*": NO_TEMPLATE,
    "ProcessorTest.test_get_num_multimodal_tokens_matches_processor_call*": NO_PLACEHOLDERS,
    "ProcessorTest.test_replacement_offsets": NO_PLACEHOLDERS,
}
# … and these would fail.
SKIPPED_HERE = {
    "*PairTest.test_attention_outputs": TWO_PASSES,
    "*PairTest.test_hidden_states_output": TWO_PASSES,
    "*PairTest.test_retain_grad_hidden_states_attentions": TWO_PASSES,
    "*CaptionTest.test_retain_grad_hidden_states_attentions": JOINED,
    "[!R]*.test_eager_matches_batched_and_grouped_inference_*": ONE_EXPERT,
    "[!R]*.test_output_router_logits_from_config": ONE_EXPERT,
    "Relative*.test_eager_matches_batched_and_grouped_inference_*": ONE_EXPERT,
    "Relative*.test_output_router_logits_from_config": ONE_EXPERT,
    "ProcessorTest.test_processor_text_has_no_visual": "images are a flat list, not a list of images per text",
}
EXPECTED_SKIPS = {**SKIPPED_HERE, **SKIPPED_BY_TRANSFORMERS}

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "max_position_embeddings": 32,
    "projection_dim": 24,
}
ARCHITECTURES = {
    "Dense": {},
    "Routed": {"experts_per_group": 4, "experts_per_token": 2},
    "Unshared": {"share_attention": False, "sub_layernorm": True},
    "Relative": {"position_embedding_type": "relative"},
}


class MomeTester:
    """What the tests want to know about a model: its config, its inputs, the shapes of its outputs.

    The batch is as large as the tests ask for: they would fill it up with random ids, `<image>` among them.
    """

    batch_size = 7
    text_length = 8
    seq_length = 8
    num_hidden_layers = TINY["num_hidden_layers"]
    hidden_size = TINY["hidden_size"]
    num_attention_heads = TINY["num_attention_heads"]
    vocab_size = TINY["vocab_size"]
    is_training = False

    def __init__(self, overrides: dict):
        self.overrides = overrides

    def get_config(self) -> MomeConfig:
        return MomeConfig(**TINY, **self.overrides)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.inputs()

    def inputs(self) -> dict[str, torch.Tensor]:
        return self.texts()

    def texts(self) -> dict[str, torch.Tensor]:
        """[BOS] and words; the last two tokens of the last row are padding."""
        input_ids = torch.randint(6, self.vocab_size, (self.batch_size, self.text_length), device=torch_device)
        input_ids[:, 0] = 1
        input_ids[-1, -2:] = 0
        return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}

    def images(self) -> dict[str, torch.Tensor]:
        side = TINY["image_size"]
        return {"pixel_values": torch.rand(self.batch_size, 3, side, side, device=torch_device)}


class PairTester(MomeTester):
    is_training = True

    def inputs(self):
        return {**self.texts(), **self.images()}


class CaptionTester(MomeTester):
    image_length = (TINY["image_size"] // TINY["patch_size"]) ** 2 + 1
    seq_length = image_length + MomeTester.text_length
    is_training = True

    def inputs(self):
        texts, image = self.texts(), (self.image_length, 0)
        texts["input_ids"] = torch.nn.functional.pad(texts["input_ids"], image, value=MomeConfig.image_token_id)
        texts["attention_mask"] = torch.nn.functional.pad(texts["attention_mask"], image, value=1)
        return {**texts, **self.images()}


class SkippedHere:
    def setUp(self):
        name = f"{type(self).__name__}.{self._testMethodName}"
        for pattern, reason in SKIPPED_HERE.items():
            if fnmatchcase(name, pattern):
                self.skipTest(reason)
        super().setUp()


class MomeSuite(SkippedHere, modeling.ModelTesterMixin):
    """transformers' tests of a model; a subclass says how the model is called and what its config overrides."""

    inputs_of: type[MomeTester]
    overrides: dict

    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        self.model_tester = self.inputs_of(self.overrides)

    def _text_features_prepare_config_and_inputs(self):
        config = self.model_tester.get_config()
        config.text_config = config  # these tests know nested configs only
        return config, self.model_tester.texts()

    def _image_features_prepare_config_and_inputs(self):
        return self.model_tester.get_config(), self.model_tester.images()

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        with patch.object(modeling_utils, "checkpoint", checkpoint_each_pass):
            super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_can_init_all_missing_weights(self):
        # It is for models from 2023 on, by their copyright line, and loads a checkpoint without weights, which MoME
        # refuses.
        anything = classmethod(PreTrainedModel.from_pretrained.__func__)
        with (
            patch.object(modeling, "open", mock_open(read_data="# Copyright 2026"), create=True),
            patch.object(MomePreTrainedModel, "from_pretrained", anything),
        ):
            super().test_can_init_all_missing_weights()

    def test_model_forward_default_config_values(self):
        with patch.dict(modeling.MODEL_MAPPING_NAMES, mome="MomeModel"):  # it looks at models of transformers only
            super().test_model_forward_default_config_values()


class TextSuite(MomeSuite):
    """A text alone."""

    inputs_of = MomeTester
    all_model_classes = (MomeModel,)


class PairSuite(MomeSuite):
    """Images and texts in one space."""

    inputs_of = PairTester
    all_model_classes = (MomeModel,)
    additional_model_inputs = ["pixel_values"]

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        return {**inputs, "return_loss": True} if return_labels else inputs


class CaptionSuite(MomeSuite, modeling.GenerationTesterMixin):
    """Captions, the image tokens in `input_ids`."""

    inputs_of = CaptionTester
    all_model_classes = (MomeForConditionalGeneration,)
    additional_model_inputs = ["pixel_values"]

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        return {**inputs, "labels": inputs["input_ids"].clone()} if return_labels else inputs

    def test_causal_lm_loss_honors_shift_labels(self):
        name = MomeForConditionalGeneration.__name__
        with patch.dict(modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, mome=name):  # as above
            super().test_causal_lm_loss_honors_shift_labels()


def set_epsilon(config):
    """The norms' epsilon at 1, so that rounding is not blown up; transformers' own sets keys that MoME has not."""
    config.layer_norm_eps = 1.0


def checkpoint_each_pass(forward, *args, **kwargs):
    """Gradient checkpointing for the tests, which count the calls of a layer with a mock.

    The mock runs what it was last set to. A layer that takes part in several passes has to run each one again.
    """
    if not isinstance(forward, Mock):
        return checkpoint(forward, *args, **kwargs)
    this_pass = forward.side_effect

    def run(*inputs):
        forward.side_effect = this_pass
        return forward(*inputs)

    return checkpoint(run, *args, **kwargs)


modeling.set_config_for_less_flaky_test = set_epsilon


def make_tests(suite: type[MomeSuite], architectures: dict[str, dict]):
    for architecture, overrides in architectures.items():
        name = architecture + suite.__name__.replace("Suite", "Test")
        globals()[name] = type(name, (suite, unittest.TestCase), {"overrides": overrides, "__module__": __name__})


make_tests(TextSuite, ARCHITECTURES)
make_tests(PairSuite, ARCHITECTURES)
make_tests(CaptionSuite, {**ARCHITECTURES, "Masked": {"caption_objective": "masked", "mask_token_id": 5}})


class ConfigTest(unittest.TestCase):
    def test_config(self):
        configuration.ConfigTester(self, config_class=MomeConfig, **TINY).run_common_tests()


class ProcessorTest(SkippedHere, processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = MomeProcessor

    @classmethod
    def _setup_from_components(cls):
        words = [*WORDS.split(), "lower", "newer", "upper", "older", "longer", "string"]  # those that the mixin says
        processor = build_processor(image_size=TINY["image_size"], max_length=200)
        processor.tokenizer = build_tokenizer(words, 200)
        return processor
