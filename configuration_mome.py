"""MoME configuration: one flat, strict record of the architecture.

- the union of what VLMo (2111.02358) and BEiT-3 (2208.10442) need, and learned routing inside a modality;
- `MOME_SIZES`, the table of named sizes, read by `MomeConfig.from_size`;
- unknown keys and impossible combinations are refused with the offending value in the message;
- `MomePublishedConfig`, what a config says about the code beside the weights; it refuses unknown keys;
- `did_you_mean`, the hint that all errors about unknown names give; `quoted`, `shortened` and `listed`, how messages
  show values and names.
"""

import copy
import dataclasses
import difflib
import os
import reprlib
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, get_args, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# The ViT family's widths and depths; base and large are also those of VLMo and BEiT-3.
MOME_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}

# Where a folder without the installed package finds the code, all of it whatever class was saved.
AUTO_MAP: dict[str, str] = {
    "AutoConfig": "configuration_mome.MomeConfig",
    "AutoModel": "modeling_mome.MomeModel",
    "AutoModelForImageTextToText": "modeling_mome.MomeForConditionalGeneration",
    "AutoModelForZeroShotImageClassification": "modeling_mome.MomeModel",
}

# The pipelines of our own that a folder brings along, by task.
CUSTOM_PIPELINES: dict[str, dict] = {
    "image-captioning": {"impl": "pipeline_mome.MomeImageCaptioningPipeline", "pt": ["AutoModelForImageTextToText"]},
    "open-vocabulary-image-classification": {
        "impl": "pipeline_mome.MomeZeroShotImageClassificationPipeline",
        "pt": ["AutoModelForZeroShotImageClassification"],
    },
    # transformers' tasks, whose own pipelines drop the transparency of pictures.
    "image-feature-extraction": {"impl": "pipeline_mome.MomeFeatureStockPipeline", "pt": ["AutoModel"]},
    "image-text-to-text": {"impl": "pipeline_mome.MomeTextStockPipeline", "pt": ["AutoModelForImageTextToText"]},
    "zero-shot-image-classification": {
        "impl": "pipeline_mome.MomeZeroShotStockPipeline",
        "pt": ["AutoModelForZeroShotImageClassification"],
    },
}

# Keys that transformers itself passes to or writes into any config, beside the dataclass fields.
_TRANSFORMERS_KEYS = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",
        "custom_pipelines",
        "dtype",
        "experts_implementation",
        "is_encoder_decoder",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "per_layer_config",
        "problem_type",
        "quantization_config",
        "return_dict",
        "tie_last_hidden_states",
        "torch_dtype",
        "transformers_version",
    }
)


LONGEST_PATH = 4096  # of a file, in characters
LONGEST_PATH_SHOWN = 240  # of one that is not there: where it goes wrong is in the middle as well

_REPR = reprlib.Repr()  # as `repr`, but of a large collection or text no more than a message needs
for _kind in ("list", "tuple", "dict", "set", "frozenset", "deque", "array"):
    setattr(_REPR, f"max{_kind}", 100)
_REPR.maxstring = _REPR.maxlong = 1000
_REPR.maxother = 10_000_000


def did_you_mean(name: Any, choices: Iterable[str], otherwise: str) -> str:
    """What to say to an unknown name: the closest of the choices as a question, or `otherwise` if none is close."""
    close = difflib.get_close_matches(shortened(name), list(choices), n=1)
    return f"did you mean {quoted(close[0])}?" if close else otherwise


def quoted(value: Any, limit: int = 80) -> str:
    """A value as an error message shows it, in one line: its `repr`, without its middle if it is longer than `limit`.

    So both ends are there: how a text or data begin, and the name of a file. The path of a file that is there stays
    whole, since no system has endless ones.
    """
    text = _cut(value, limit)
    return repr(text) if isinstance(value, (str, os.PathLike)) else text


def shortened(value: Any, limit: int = 80) -> str:
    """As `quoted`, without quotation marks."""
    text = _cut(value, limit)
    return text if text.isprintable() else repr(text)[1:-1]


def listed(names: Iterable[Any], most: int = 10) -> str:
    """The first of some names, separated by commas, and how many more there are."""
    names = list(names)
    shown = shortened(", ".join(shortened(name) for name in names[:most]), 400)
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def _cut(value: Any, limit: int) -> str:
    if isinstance(value, (str, os.PathLike)):
        text = str(os.fsdecode(value))  # of a subclass, such as NumPy's, the plain text
        if limit < len(text) <= LONGEST_PATH and os.path.lexists(text):
            return text
        if isinstance(value, os.PathLike):
            limit = max(limit, LONGEST_PATH_SHOWN)
    else:
        try:
            text = " ".join(_REPR.repr(value).split())
        except ValueError:  # Python refuses to write an integer of thousands of digits
            text = f"{type(value).__name__} of too many digits"
    start = limit * 5 // 8
    return text if len(text) <= limit else f"{text[:start]}…{text[start + 1 - limit :]}"


def checked_in_one_line(config_class: type) -> type:
    """For a class under `@strict`: a value of a wrong type is a ValueError in one line that names it and the type."""
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}
    check = config_class.__setattr__

    def set_attribute(self, name: str, value: Any):
        try:
            check(self, name, value)
        except StrictDataclassFieldValidationError:
            kind = kinds[name]
            wanted = f"is of type {type(value).__name__}, expected {getattr(kind, '__name__', kind)}"
            if get_origin(kind) is Literal:
                wanted = f"is not known: choose {' or '.join(map(repr, get_args(kind)))}"
            raise ValueError(f"{name}={quoted(value)} {wanted}") from None

    config_class.__setattr__ = set_attribute
    return config_class


class MomePublishedConfig:
    """What a config of this package adds to transformers' `PreTrainedConfig`.

    It names the code beside the weights (`auto_map`, `custom_pipelines`) and refuses keys that it doesn't know.
    """

    _auto_class = "AutoConfig"
    code: ClassVar[dict[str, str]]  # the `auto_map`, all of it whatever class was saved

    def __post_init__(self, **kwargs):
        self._refuse_unknown_keys(kwargs)
        self.check()
        self._check_token_ids()
        # Not what was loaded: a Hub repository's name in it would outlive the copy of its code beside the weights.
        kwargs["auto_map"] = dict(self.code)
        kwargs.pop("custom_pipelines", None)
        if type(self).__module__.startswith("transformers_modules"):
            # Code from a folder. Whoever has the package gets its pipelines, and must not be asked for
            # trust_remote_code because a config names some.
            kwargs["custom_pipelines"] = copy.deepcopy(CUSTOM_PIPELINES)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """As `PreTrainedConfig.to_dict`, with all of our pipelines, whatever a pipeline has written there."""
        return {**super().to_dict(), "custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}

    def check(self):
        """Raises a ValueError with the value if the fields don't fit one another."""

    def _check_token_ids(self):
        """Raises a ValueError with the value if one that is given is not in the vocabulary."""
        for name in (field.name for field in dataclasses.fields(self) if field.name.endswith("_token_id")):
            given = getattr(self, name)
            for token in given if isinstance(given, (list, tuple)) else [given]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name}={quoted(given)} is not an id of vocab_size={self.vocab_size}")

    def _refuse_unknown_keys(self, kwargs):
        fields, name = [field.name for field in dataclasses.fields(self)], type(self).__name__
        for key in kwargs:
            if key not in _TRANSFORMERS_KEYS:
                hint = did_you_mean(key, fields, f"see the {name} docstring for the known keys")
                raise ValueError(f"unknown {name} key {quoted(key)} (value {quoted(kwargs[key])}): {hint}")

    def _check_positive(self, names: str):
        for name in names.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={quoted(getattr(self, name))} must be at least 1")

    def _check_activation(self):
        if self.hidden_act not in ACT2FN:
            hint = did_you_mean(self.hidden_act, ACT2FN, "choose a key of transformers.activations.ACT2FN")
            raise ValueError(f"hidden_act={quoted(self.hidden_act)} is not known: {hint}")


@checked_in_one_line
@strict
class MomeConfig(MomePublishedConfig, PreTrainedConfig):
    r"""Architecture of a mixture-of-modality-experts transformer.

    Args:
        vocab_size: rows of the word embedding and of the caption head.
        hidden_size: width of the trunk.
        intermediate_size: width of a dense feed-forward, and of an expert unless `expert_intermediate_size` is set.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of every attention; must divide `hidden_size`.
        hidden_act: activation of the experts, a key of `transformers.activations.ACT2FN`.
        image_size: side of the square input image in pixels.
        patch_size: side of a patch in pixels; must divide `image_size`, unless `crop_image`.
        crop_image: leave out the pixels at the right and at the bottom that fill no patch (SigLIP's 384 pixels in
            patches of 14).
        num_channels: channels of `pixel_values`.
        patch_embedding_type: `linear` (one strided convolution) or `conv_stem` (a stack of 3×3 convolutions of
            stride 2 with GroupNorm, 2106.14881; `patch_size` must be a power of two).
        max_position_embeddings: longest text in tokens, `[BOS]` and `[EOS]` counted.
        image_cls_token: `[CLS]` before the patches; SigLIP has none.
        image_pooling: what stands for an image: its `first` token, or `attention` of a learned probe over all of them
            (SigLIP, 2303.15343).
        text_pooling: what stands for a text: its `first` or its `last` token (SigLIP).
        text_start_token: whether texts begin with `[BOS]`. `False` (SigLIP): only captions do, and the text pass
            leaves it out.
        fixed_text_length: the text pass fills every text with padding up to `max_position_embeddings`, and every token
            sees all of it, whatever padding and mask the caller has (SigLIP); captions are not padded.
        position_embedding_type: `absolute` (one learned table per modality) or `relative` (VLMo's one table of
            biases over image, text and cross-modal distances, with a column per head and layer; no text positions).
        text_embedding_norm: LayerNorm (eps 1e-12) over the text embedding, as in BERT and VLMo.
        modality_embedding: learned vector added to every token of a modality (VLMo's token types).
        image_mask_token: learned stand-in for the patches that `bool_masked_pos` masks (BEiT-3's masked images).
        share_attention: `True` (VLMo): attention, its norm and the final norm serve both modalities; `False`
            (BEiT-3): each modality has its own.
        fusion_start_layer: first layer whose tokens use the `joint` experts in a fused pass; `None`: no such experts.
        sub_layernorm: LayerNorm before the attention's output projection and before the experts' second matrix
            (Magneto, 2210.06423; BEiT-3).
        final_norm: LayerNorm behind the last layer; BEiT-3's image classifiers and answerers have none.
        layer_scale_init_value: start value of the per-channel scale on both residual branches; `None`: no scale.
        layer_norm_eps: epsilon of every LayerNorm of the trunk.
        hidden_dropout: dropout after the embeddings and on both residual branches.
        attention_dropout: dropout on the attention weights.
        initializer_range: standard deviation of the normal initialisation.
        projection_dim: dimension of `image_embeds` and `text_embeds`.
        image_projection: a linear layer from the pooled image to its embedding; `False` (SigLIP): it is the embedding.
        projection_bias: the projections of image and text have a bias (SigLIP).
        contrastive_objective: `softmax` (CLIP: a text is chosen among all, an image likewise) or `sigmoid` (SigLIP,
            2303.15343: each pair is scored alone, with a learned bias).
        logit_bias_init_value: start value of that bias.
        joint_projection: a second pair of projections and a scale for embeddings whose upper layers ran through the
            `joint` experts (VLMo's `itc_vl`).
        multimodal_pooler: dense layer and tanh over the text's first token of a fused pass (VLMo, as in BERT).
        matching_head: classifier on the pooler's output that tells whether image and text belong together (VLMo's
            image–text matching).
        logit_scale_init_value: start value of the log of the inverse temperature (CLIP: ln(1/0.07)).
        caption_experts: caption tokens have experts of their own, and attention and norms unless shared, so that
            learning captions leaves the embeddings of texts as they are.
        caption_objective: `causal` (a caption token predicts the next one) or `masked` (BEiT-3: the next token is
            read from a `[MASK]` put behind the caption so far).
        lm_head_transform: BERT's dense-activation-norm before the caption head's matrix (VLMo).
        tie_word_embeddings: share the matrix of the caption head with the word embedding.
        experts_per_group: experts in each of the groups `image`, `text`, `joint`. 1 is hard modality routing.
        experts_per_token: how many experts of its group a token uses; may be set anew where a model is loaded.
        expert_intermediate_size: inner width of a routed expert.
        shared_expert: an expert beside the routed ones that every token of the group uses.
        router_aux_loss_coef: weight of the balance loss, per group.
        router_z_loss_coef: weight of the router z-loss (2202.08906), per group.
        output_router_logits: return the router logits by default.
        contrastive_loss_weight: weight of the image–text contrastive loss in the captioner's joint loss.
        caption_loss_weight: weight of the caption loss in the joint loss (CoCa, 2205.01917: 1 and 2).
        use_cache: keep keys and values while generating.
        pad_token_id, bos_token_id, eos_token_id: special tokens of the text; several may end it.
        mask_token_id: the `[MASK]` of the `masked` caption objective.
        image_token_id: stands for one image token in `input_ids`; an id below `vocab_size`, never embedded.

    Raises:
        ValueError: an unknown key or an impossible combination, with the value.
    """

    model_type = "mome"
    code = AUTO_MAP

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    image_size: int = 224
    patch_size: int = 16
    crop_image: bool = False
    num_channels: int = 3
    patch_embedding_type: Literal["linear", "conv_stem"] = "linear"
    max_position_embeddings: int = 64
    image_cls_token: bool = True
    image_pooling: Literal["first", "attention"] = "first"
    text_pooling: Literal["first", "last"] = "first"
    text_start_token: bool = True
    fixed_text_length: bool = False
    position_embedding_type: Literal["absolute", "relative"] = "absolute"
    text_embedding_norm: bool = False
    modality_embedding: bool = False
    image_mask_token: bool = False
    share_attention: bool = True
    fusion_start_layer: int | None = None
    sub_layernorm: bool = False
    final_norm: bool = True
    layer_scale_init_value: float | int | None = None
    layer_norm_eps: float = 1e-6
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    projection_dim: int = 512
    image_projection: bool = True
    projection_bias: bool = False
    contrastive_objective: Literal["softmax", "sigmoid"] = "softmax"
    logit_bias_init_value: float | int = -10.0
    joint_projection: bool = False
    multimodal_pooler: bool = False
    matching_head: bool = False
    logit_scale_init_value: float = 2.6592
    caption_experts: bool = False
    caption_objective: Literal["causal", "masked"] = "causal"
    lm_head_transform: bool = False
    tie_word_embeddings: bool = True
    experts_per_group: int = 1
    experts_per_token: int = 1
    expert_intermediate_size: int | None = None
    shared_expert: bool = False
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    output_router_logits: bool = False
    contrastive_loss_weight: float | int = 1.0
    caption_loss_weight: float | int = 2.0
    use_cache: bool = True
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int | list[int] | None = 2
    mask_token_id: int | None = None
    image_token_id: int = 3

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.contrastive_objective == "sigmoid":
            # In memory only: transformers' zero-shot pipeline takes the sigmoid of logits, not the softmax, for models
            # with this word in their type. Files say `mome`.
            self.model_type = "mome_siglip"

    @classmethod
    def from_size(cls, size: str, **overrides) -> "MomeConfig":
        """A config of one of the named sizes (`tiny`, `small`, `base`, `large`); `overrides` win over the table."""
        if size not in MOME_SIZES:
            raise ValueError(f"unknown size {quoted(size)}: choose one of {', '.join(MOME_SIZES)}")
        return cls(**{**MOME_SIZES[size], **overrides})

    def check(self):
        """Raises a ValueError with the value if sizes, experts and heads don't fit one another."""
        self._check_dimensions()
        self._check_experts()
        self._check_heads()

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image in the trunk: `[CLS]`, if there is one, and the patches."""
        return self.grid_size**2 + self.image_cls_token

    @property
    def caption_group(self) -> str:
        """The group of the tokens of a caption."""
        return "caption" if self.caption_experts else "text"

    @property
    def token_groups(self) -> tuple[str, ...]:
        """The groups of tokens that every layer has experts for."""
        return tuple(dict.fromkeys(("image", "text", self.caption_group)))

    def _check_dimensions(self):
        self._check_positive(
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size "
            "num_channels max_position_embeddings projection_dim experts_per_group experts_per_token"
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.image_size % self.patch_size and not self.crop_image:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: crop_image=True "
                "leaves out the rest"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size={self.image_size} is less than patch_size={self.patch_size}")
        if self.patch_embedding_type == "conv_stem":
            stages = self.patch_size.bit_length() - 1
            if stages < 1 or self.patch_size != 2**stages:
                raise ValueError(
                    f"patch_size={self.patch_size} must be a power of two (2 or more) for "
                    "patch_embedding_type='conv_stem': use 'linear' or another patch_size"
                )
            if self.hidden_size % 2 ** (stages - 1):
                raise ValueError(
                    f"hidden_size={self.hidden_size} must be a multiple of {2 ** (stages - 1)} for "
                    f"patch_embedding_type='conv_stem' with patch_size={self.patch_size}"
                )
        if self.fusion_start_layer is not None and not 0 <= self.fusion_start_layer < self.num_hidden_layers:
            raise ValueError(
                f"fusion_start_layer={self.fusion_start_layer} is not a layer of num_hidden_layers="
                f"{self.num_hidden_layers}: use None for no joint experts"
            )
        self._check_activation()
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")

    def _check_experts(self):
        if self.experts_per_token > self.experts_per_group:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than experts_per_group={self.experts_per_group}: "
                f"choose {self.experts_per_group} or fewer"
            )
        if self.experts_per_group == 1 and self.shared_expert:
            raise ValueError("shared_expert=True needs experts_per_group of 2 or more, got experts_per_group=1")
        if self.experts_per_group == 1 and self.expert_intermediate_size is not None:
            raise ValueError(
                f"expert_intermediate_size={self.expert_intermediate_size} needs experts_per_group of 2 or more: "
                "set intermediate_size instead"
            )

    def _check_heads(self):
        if not self.image_cls_token and self.image_pooling == "first":
            raise ValueError("image_cls_token=False leaves image_pooling='first' nothing to pool: set 'attention'")
        if not self.image_cls_token and self.position_embedding_type == "relative":
            raise ValueError("position_embedding_type='relative' places [CLS]: set image_cls_token=True")
        if not self.image_projection and self.projection_dim != self.hidden_size:
            raise ValueError(
                f"image_projection=False makes embeddings of hidden_size={self.hidden_size} dimensions, got "
                f"projection_dim={self.projection_dim}"
            )
        if self.joint_projection and self.fusion_start_layer is None:
            raise ValueError("joint_projection=True needs joint experts, got fusion_start_layer=None")
        if self.matching_head and not self.multimodal_pooler:
            raise ValueError("matching_head=True reads the pooler: set multimodal_pooler=True as well")

    def _check_token_ids(self):
        if self.caption_objective == "masked" and self.mask_token_id is None:
            raise ValueError("caption_objective='masked' needs a mask_token_id, got mask_token_id=None")
        super()._check_token_ids()


__all__ = [
    "AUTO_MAP",
    "CUSTOM_PIPELINES",
    "MOME_SIZES",
    "MomeConfig",
    "MomePublishedConfig",
    "checked_in_one_line",
    "did_you_mean",
    "listed",
    "quoted",
    "shortened",
]
