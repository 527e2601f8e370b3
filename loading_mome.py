"""Loading a checkpoint: weights that are missing or left over are an error, not a warning; int8 weights load again."""

import json
from typing import Any

from .configuration_mome import listed, shortened


class MomeCompleteLoading:
    """What a model class adds to transformers' `PreTrainedModel`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As `PreTrainedModel.from_pretrained`, but a checkpoint that does not fit is an error.

        Raises:
            ValueError: weights are missing from the checkpoint or unknown to the model. A caller who asks for
                `output_loading_info=True` gets the model and the report instead.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if output_loading_info:
            return model, info
        for problem in ("missing", "unexpected"):
            if keys := sorted(info[f"{problem}_keys"]):
                some = listed(keys, 3)
                raise ValueError(
                    f"{shortened(pretrained_model_name_or_path)} does not fit {cls.__name__}: {problem} weights "
                    f"{some}. Load it with the class in its config.json, or pass output_loading_info=True to take "
                    "what fits."
                )
        return model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`; weights in torchao's int8 can be loaded again."""
        quantizer = getattr(self, "hf_quantizer", None)
        if not hasattr(quantizer, "get_state_dict_and_metadata"):
            return super().save_pretrained(save_directory, *args, **kwargs)
        flattened = quantizer.get_state_dict_and_metadata

        def with_names(*arguments, **options):
            weights, metadata = flattened(*arguments, **options)
            return weights, with_loadable_names(metadata, f"{self.base_model_prefix}.")

        quantizer.get_state_dict_and_metadata = with_names
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            del quantizer.get_state_dict_and_metadata


def with_loadable_names(metadata: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What torchao writes of its tensors (`tensor_names`, and JSON for each), so that every class reads it.

    - Without names that have no dot, such as `logit_scale`: it splits all at a dot. They are plain tensors, which
      transformers loads by themselves.
    - Names with `prefix` also without: those by which the model inside of a captioner looks for its weights.
    """
    if "tensor_names" not in metadata:
        return metadata
    names = [name for name in json.loads(metadata["tensor_names"]) if "." in name]
    inside = [name for name in names if name.startswith(prefix) and "." in name.removeprefix(prefix)]
    names += [name.removeprefix(prefix) for name in inside]
    return (
        metadata | {name.removeprefix(prefix): metadata[name] for name in inside} | {"tensor_names": json.dumps(names)}
    )


__all__ = ["MomeCompleteLoading", "with_loadable_names"]
