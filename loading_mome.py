"""Loading a checkpoint: weights that are missing or left over are an error, not a warning."""

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


__all__ = ["MomeCompleteLoading"]
