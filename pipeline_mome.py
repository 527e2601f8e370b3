"""Pipelines of MoME's own: `pipeline("image-captioning", model=path, trust_remote_code=True)(image)`.

- `MomeImageCaptioningPipeline`: captions with their fit to the image, guided if wanted, one image or thousands;
- `MomeZeroShotImageClassificationPipeline`: any labels, thousands of them, embedded once;
- `Mome...StockPipeline`: transformers' own, which drop transparency, with our way of opening pictures; a checkpoint
  that is loaded with `trust_remote_code=True` brings them for the stock tasks;
- they are named in the config of every checkpoint, and registered by `import mome` for those who have the package.

    image ── processor ── generate(), guided ── ids ── text
                               └── cosine of image and caption, from the same image pass ── score
"""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import (
    ImageFeatureExtractionPipeline,
    ImageTextToTextPipeline,
    Pipeline,
    ZeroShotImageClassificationPipeline,
)
from transformers.utils import logging

from .configuration_mome import quoted
from .guidance_mome import guidance_options
from .inputs_mome import Pictures, is_count, pictures_of
from .losses_mome import pair_scores
from .pictures_mome import count_blank, load_images, load_rgb_image, warn_of_blank
from .texts_mome import (
    ids_of_texts,
    longest_text,
    no_words,
    tokenize_texts,
    warn_of_cut_texts,
    warn_of_equal_labels,
    wordless_texts,
)

logger = logging.get_logger(__name__)


class MomeImagePipeline(Pipeline):
    """What the pipelines share: images of any kind in, those that can't be read named, and everything saved."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, images: Any = None, **kwargs):
        images = kwargs.pop("inputs", images)
        if images is None:
            raise ValueError("images=None: pass an image, a list of images, a data set or a generator")
        several = pictures_of(images)
        if isinstance(several, list):
            if not several:
                return []
            images = [_named(image, f"images[{index}]") for index, image in enumerate(several)]
        elif isinstance(several, Pictures):
            images = _NamedPictures(several)
        elif several is not None:
            images = (_named(image, f"images[{index}]") for index, image in enumerate(several))
        self.blank = 0
        results = super().__call__(images, **kwargs)
        if not isinstance(results, list):  # of a data set or a generator, not begun yet
            return _WithReport(results, self._report_blank)
        self._report_blank()
        return results

    def _report_blank(self):
        """One warning for all pictures of one single colour in a call."""
        warn_of_blank(self.blank)
        self.blank = 0

    def _count_blank(self, inputs: dict[str, Any]):
        """Counts a batch, without the places of pictures that can't be read."""
        failures = inputs["failure"] if isinstance(inputs["failure"], list) else [inputs["failure"]]
        self.blank += count_blank(inputs["pixel_values"][[failure is None for failure in failures]])

    def _pixel_values(self, image: Any) -> dict[str, torch.Tensor]:
        """An image → `pixel_values` (1, channels, height, width), without a warning for each."""
        image_processor = self.processor.image_processor
        return getattr(image_processor, "process", image_processor)([image], return_tensors="pt")

    def _read(self, image: Any, on_error: str) -> tuple[Any, str | None]:
        """An image, or one in its place and the reason why it can't be read."""
        item = _named(image, "image")
        try:
            if isinstance(item["image"], Exception):  # a data set could not decode it
                raise ValueError(f"{item['name']}: {item['image']}".splitlines()[0])
            return load_rgb_image(item["image"], item["name"]), None
        except ValueError as error:
            if on_error == "raise":
                raise
            logger.warning(f"skipped {error}")
            side = self.model.config.image_size
            return np.zeros((side, side, 3), dtype=np.uint8), str(error)  # so that a batch keeps its shape

    @property
    def longest_text(self) -> int:
        """The most tokens of a text; what is longer is cut, with one warning."""
        return longest_text(self.processor.tokenizer, self.model.config)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As `Pipeline.save_pretrained`, and the processor, without which nothing would load."""
        super().save_pretrained(save_directory, **kwargs)
        kwargs.pop("max_shard_size", None)
        self.processor.save_pretrained(save_directory, **kwargs)


class _NamedPictures(Pictures):
    """With what an error calls each picture."""

    def __getitem__(self, place: int) -> dict[str, Any]:
        return _named(self.values[place], f"images[{place}]")


def _check_on_error(on_error: str | None):
    if on_error not in (None, "raise", "skip"):
        raise ValueError(f"on_error={quoted(on_error)}: choose 'raise' or 'skip'")


def _check_generate_kwargs(options: Any):
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"generate_kwargs={quoted(options)}: pass options of generate() in a dict")
    for name in ("pixel_values", "input_ids", "attention_mask"):
        if name in (options or {}):
            raise ValueError(f"generate_kwargs has {name}, which the pipeline makes of image and prompt: leave it out")


def _given(**options) -> dict[str, Any]:
    """Options that a call has; what it hasn't must not replace what the pipeline was made with."""
    return {key: value for key, value in options.items() if value is not None}


class MomeImageCaptioningPipeline(MomeImagePipeline):
    """Captions images.

    ```python
    caption = pipeline("image-captioning", model=path, trust_remote_code=True)
    caption("cat.jpg")                                     # [{"generated_text": "a cat", "score": 0.31}]
    caption(["cat.jpg", url, pil_image], batch_size=8)     # a list of such lists; of a data set, an iterator
    caption(image, num_captions=3, guidance="rerank", prompt="a photo of")
    ```

    The score is the cosine of the embeddings of image and caption, -1 to 1; the captions of an image come in the order
    of `generate()`: best first.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "generate"):
            raise ValueError(
                f"a {type(self.model).__name__} writes no captions: load it with AutoModelForImageTextToText"
            )

    def __call__(self, images: Any = None, **kwargs) -> list:
        """Captions one image or many.

        Args:
            images: an image (path, http(s) URL, PIL image, array or tensor), a list of images, a data set, a stream, a
                column `data["image"]`, a `KeyDataset` or a generator. Of a data set the first column of type Image is
                taken; an item of anything else may be a dict with the image under `image`.
            kwargs: those below, and for all pipelines `batch_size` (default 1) and `num_workers`.
                num_captions: captions per image. Default: 1, or what the checkpoint's generation config says.
                guidance: `"rerank"`, `"classifier-free"`, `"contrastive"`, several of them in a list, `"none"`, or
                    fields of `MomeGenerationConfig` in a dict. Default: what the checkpoint has.
                prompt: beginning of every caption; part of the text that is returned. Cut with a warning if it is
                    too long for the model.
                max_new_tokens: longest caption in tokens, without the prompt.
                generate_kwargs: more options of `generate()`: beams, sampling, lengths.
                on_error: `"raise"` stops at an image that can't be read; `"skip"` goes on, warns, and returns
                    `[{"generated_text": None, "score": None, "error": reason}]` in its place.

        Returns:
            For an image a list of `{"generated_text": str, "score": float}`; for a list, a list of those; for a data
            set or a generator an iterator, which reads and computes as it goes (`tqdm(caption(data))` shows a bar).

        Raises:
            ValueError: an image that can't be read, with its name and the reason; an option that can't be.
        """
        return super().__call__(images, **kwargs)

    def _sanitize_parameters(
        self,
        num_captions: int | None = None,
        guidance: str | Iterable[str] | dict[str, Any] | None = None,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        on_error: str | None = None,
        **unknown,
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise ValueError(
                f"unknown option {quoted(next(iter(unknown)))} of image-captioning: options of generate() go into "
                "generate_kwargs={...}"
            )
        _check_on_error(on_error)
        if prompt is not None:
            self._check_prompt(prompt)
        if num_captions is not None and not is_count(num_captions):
            raise ValueError(f"num_captions={quoted(num_captions)} must be an integer of at least 1")
        if max_new_tokens is not None and not is_count(max_new_tokens):
            raise ValueError(f"max_new_tokens={quoted(max_new_tokens)} must be an integer of at least 1")
        _check_generate_kwargs(generate_kwargs)
        forward = _given(
            num_captions=num_captions,
            guidance=None if guidance is None else guidance_options(guidance),
            max_new_tokens=max_new_tokens,
            generate_kwargs=generate_kwargs,
        )
        return _given(prompt=prompt, on_error=on_error), forward, {}

    def _check_prompt(self, prompt: Any):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={quoted(prompt)} is of type {type(prompt).__name__}: pass a string")
        inputs, cut = tokenize_texts(self.processor.tokenizer, [prompt], self.longest_text)
        if prompt.strip() and wordless_texts(self.processor.tokenizer, inputs["input_ids"].tolist()):
            raise ValueError(no_words(prompt, "prompt"))
        warn_of_cut_texts(len(cut), self.longest_text, "prompt")

    def preprocess(self, image: Any, prompt: str = "", on_error: str = "raise") -> dict[str, Any]:
        """An image → `pixel_values` (1, channels, height, width), `input_ids` (1, tokens); or why there are none."""
        image, failure = self._read(image, on_error)
        lengths = {"truncation": True, "max_length": self.longest_text}
        inputs = self.processor(text=prompt, caption_prompt=True, return_tensors="pt", **lengths)
        inputs = {**self._pixel_values(image), **inputs}
        inputs = {key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")}
        return {**inputs, "failure": failure}

    def _forward(self, inputs: dict[str, Any], num_captions: int | None = None, **options) -> dict[str, Any]:
        """A batch → per image its captions, (ids, cosine) each, and why there are none."""
        self._count_blank(inputs)
        failures = inputs["failure"] if isinstance(inputs["failure"], list) else [inputs["failure"]]
        readable = [row for row, failure in enumerate(failures) if failure is None]
        captions: list[list] = [[] for _ in failures]
        if readable:
            tensors = {key: value[readable] for key, value in inputs.items() if key != "failure"}
            outputs = self.model.generate(**tensors, **self._generation_options(num_captions, **options))
            each = outputs.sequences.shape[0] // len(readable)
            batches = zip(readable, outputs.sequences.split(each), outputs.cosine.split(each))
            for row, sequences, cosines in batches:
                captions[row] = list(zip(sequences.tolist(), cosines.tolist()))
        return {"captions": captions, "failure": failures}

    def _generation_options(
        self,
        num_captions: int | None,
        guidance: dict[str, Any] | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        options = {
            **(guidance or {}),
            "max_new_tokens": max_new_tokens,
            **(generate_kwargs or {}),
            "output_cosine": True,
        }
        options = {key: value for key, value in options.items() if value is not None}
        if num_captions is None:
            return options
        # Enough beams or candidates for the captions that are asked for, unless sampling gives them.
        options["num_return_sequences"] = num_captions
        own = self.model.generation_config
        names = ("rerank_weight", "rerank_candidates", "do_sample", "num_beams")
        current = {name: options.get(name, getattr(own, name)) for name in names}
        if current["rerank_weight"]:
            options["rerank_candidates"] = max(current["rerank_candidates"] or 1, num_captions)
        elif not current["do_sample"]:
            options["num_beams"] = max(current["num_beams"] or 1, num_captions)
        return options

    def postprocess(self, outputs: dict[str, Any]) -> list[dict[str, Any]]:
        captions, failure = outputs["captions"], outputs["failure"]
        if isinstance(failure, list):  # a batch of one
            captions, failure = captions[0], failure[0]
        if failure is not None:
            return [{"generated_text": None, "score": None, "error": failure}]
        texts = self.processor.post_process_image_text_to_text([ids for ids, _ in captions])
        return [{"generated_text": text, "score": cosine} for text, (_, cosine) in zip(texts, captions)]


class MomeZeroShotImageClassificationPipeline(MomeImagePipeline):
    """Classifies images by any labels, as many as one likes.

    Beside the stock `zero-shot-image-classification`, which embeds all labels anew for every image, it embeds labels
    once, keeps them for the next call, and puts them into several templates (2103.00020, section 3.1.4: the mean of
    the embeddings over the templates).

    ```python
    classify = pipeline("open-vocabulary-image-classification", model=path, trust_remote_code=True)
    classify(images, candidate_labels=thousands, templates=["a photo of a {}", "a drawing of a {}"], top_k=3)
    ```
    """

    label_batch_size = 256
    label_sets_kept = 8

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.label_embeds: dict[tuple, torch.Tensor] = {}

    def __call__(self, images: Any = None, **kwargs) -> list:
        """Classifies one image or many.

        Args:
            images: as for captions.
            kwargs: those below, and for all pipelines `batch_size` (default 1) and `num_workers`.
                candidate_labels: list of texts to choose from; those too long for the model are cut with a warning,
                    and a warning names those that are one to the model.
                templates: a text with `{}` where the label goes, or several. Default: the label itself.
                    `hypothesis_template` is another name for it.
                top_k: the best so many of the labels. Default: 5.
                on_error: as for captions.

        Returns:
            For an image a list of `{"label": str, "score": probability}`, best first, where the probability is that of
            the label among all or, with the sigmoid objective (SigLIP), that of the label alone; for a list, a list of
            those; for a data set or a generator an iterator.

        Raises:
            ValueError: an image that can't be read; no labels, one that is given twice, is no text or has no word that
                the tokenizer knows; a template without `{}`.
        """
        return super().__call__(images, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels: Iterable[str] | None = None,
        templates: str | Iterable[str] | None = None,
        top_k: int | None = None,
        on_error: str | None = None,
        hypothesis_template: str | Iterable[str] | None = None,
        **unknown,
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise ValueError(
                f"unknown option {quoted(next(iter(unknown)))} of open-vocabulary-image-classification: it takes "
                "candidate_labels, templates, top_k and on_error; labels that are too long are cut without being asked"
            )
        if hypothesis_template is not None:
            if templates is not None:
                raise ValueError("templates and hypothesis_template are the same option: pass one of them")
            templates = hypothesis_template
        _check_on_error(on_error)
        labels = None if candidate_labels is None else _checked_labels(candidate_labels)
        templates = None if templates is None else _checked_templates(templates)
        if top_k is not None and not is_count(top_k):
            raise ValueError(f"top_k={quoted(top_k)} must be an integer of at least 1")
        after = _given(candidate_labels=labels, top_k=top_k)
        return _given(on_error=on_error), _given(candidate_labels=labels, templates=templates), after

    def preprocess(self, image: Any, on_error: str = "raise") -> dict[str, Any]:
        image, failure = self._read(image, on_error)
        return {**self._pixel_values(image), "failure": failure}

    def _forward(
        self,
        inputs: dict[str, Any],
        candidate_labels: tuple[str, ...] | None = None,
        templates: tuple[str, ...] = ("{}",),
    ) -> dict[str, Any]:
        """A batch → probabilities (images, labels)."""
        if candidate_labels is None:
            raise ValueError("candidate_labels=None: pass the labels to choose from")
        self._count_blank(inputs)
        failure = inputs["failure"]
        label_embeds = self._embed_labels(candidate_labels, templates)
        image_embeds = self.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output.float()
        logits = image_embeds @ label_embeds.T * self.model.logit_scale.float().exp()
        if self.model.logit_bias is not None:
            logits = logits + self.model.logit_bias.float()
        return {
            "probabilities": pair_scores(self.model.config, logits),
            "failure": failure if isinstance(failure, list) else [failure],
        }

    def _embed_labels(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> torch.Tensor:
        """(labels, projection_dim), L2-normalised; computed once for the same labels and templates."""
        key = labels, templates
        if key not in self.label_embeds:
            self._check_words(labels)
            total, cut, ids = 0.0, 0, [()] * len(labels)
            for template in templates:
                embeds, too_long, more = self._embed_texts([template.replace("{}", label) for label in labels])
                total, cut = total + embeds, cut + too_long
                ids = [(*each, some) for each, some in zip(ids, more)]
            warn_of_cut_texts(cut, self.longest_text)
            warn_of_equal_labels(labels, ids)
            while len(self.label_embeds) >= self.label_sets_kept:
                del self.label_embeds[next(iter(self.label_embeds))]
            self.label_embeds[key] = torch.nn.functional.normalize(total, dim=-1)
        return self.label_embeds[key]

    def _check_words(self, labels: tuple[str, ...]):
        """Refuses a label of which nothing would be left: a template around it would hide that."""
        tokenizer = self.processor.tokenizer
        inputs, _ = tokenize_texts(tokenizer, list(labels), self.longest_text)
        for number in wordless_texts(tokenizer, inputs["input_ids"].tolist())[:1]:
            raise ValueError(no_words(labels[number], f"label {number}"))

    def _embed_texts(self, texts: list[str]) -> tuple[torch.Tensor, int, list[tuple[int, ...]]]:
        """(texts, projection_dim), how many texts were cut, and the ids of each."""
        embeds, ids, size, cut = [], [], self.label_batch_size, 0
        for start in logging.tqdm(range(0, len(texts), size), desc="labels", disable=len(texts) <= 4 * size):
            some = texts[start : start + size]
            inputs, too_long = tokenize_texts(self.processor.tokenizer, some, self.longest_text)
            embeds.append(self.model.get_text_features(**inputs.to(self.device)).pooler_output.float())
            ids += ids_of_texts(inputs)
            cut += len(too_long)
        return torch.cat(embeds), cut, ids

    def postprocess(
        self, outputs: dict[str, Any], candidate_labels: tuple[str, ...] = (), top_k: int = 5
    ) -> list[dict[str, Any]]:
        failure = outputs["failure"][0] if isinstance(outputs["failure"], list) else outputs["failure"]
        if failure is not None:
            return [{"label": None, "score": None, "error": failure}]
        best = outputs["probabilities"][0].topk(min(top_k, len(candidate_labels)))
        pairs = zip(best.indices.tolist(), best.values.tolist())
        return [{"label": candidate_labels[index], "score": score} for index, score in pairs]


def _checked_templates(templates: str | Iterable[str]) -> tuple[str, ...]:
    several = isinstance(templates, Iterable) and not isinstance(templates, str)
    templates = tuple(templates) if several else (templates,)
    if not templates:
        raise ValueError("templates is empty: pass one or more, or leave it out")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"template {quoted(template)} has no {{}} where the label goes")
    return templates


def _checked_labels(labels: Iterable[str]) -> tuple[str, ...]:
    if not isinstance(labels, Iterable):
        raise ValueError(f"candidate_labels={quoted(labels)}: pass texts in a list")
    labels = tuple(label.strip() for label in labels.split(",")) if isinstance(labels, str) else tuple(labels)
    if not labels:
        raise ValueError("candidate_labels is empty: pass the labels to choose from")
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"label {quoted(label)} is no text")
    twice = next((label for label, count in Counter(labels).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"label {quoted(twice)} is given twice: the probabilities would be shared between the two")
    return labels


class _WithReport:
    """Results of an iterator, as many as it has, with a report after the last."""

    def __init__(self, results: Any, report: Any):
        self.results, self.report = results, report
        self.started = None

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self):
        self.started = iter(self.results)
        return self

    def __next__(self):
        if self.started is None:
            iter(self)
        try:
            return next(self.started)
        except StopIteration:
            self.report()
            raise


class MomeZeroShotStockPipeline(ZeroShotImageClassificationPipeline):
    """The task `zero-shot-image-classification`, with pictures as `load_rgb_image` opens them."""

    def preprocess(self, image: Any, *args, **kwargs) -> dict[str, Any]:
        return super().preprocess(load_rgb_image(image), *args, **kwargs)


class MomeFeatureStockPipeline(ImageFeatureExtractionPipeline):
    """The task `image-feature-extraction`, with pictures as `load_rgb_image` opens them."""

    def preprocess(self, image: Any, *args, **kwargs) -> dict[str, Any]:
        return super().preprocess(load_rgb_image(image), *args, **kwargs)


class MomeTextStockPipeline(ImageTextToTextPipeline):
    """The task `image-text-to-text`, with pictures as `load_rgb_image` opens them."""

    def preprocess(self, inputs: Any = None, *args, **kwargs) -> dict[str, Any]:
        if isinstance(inputs, dict) and inputs.get("images") is not None:
            images = load_images(inputs["images"])
            inputs = {**inputs, "images": images if isinstance(inputs["images"], (list, tuple)) else images[0]}
        return super().preprocess(inputs, *args, **kwargs)


def _named(image: Any, name: str) -> dict[str, Any]:
    """An image and what an error calls it."""
    return {"name": name, **image} if isinstance(image, dict) and "image" in image else {"image": image, "name": name}


__all__ = ["MomeImageCaptioningPipeline", "MomeZeroShotImageClassificationPipeline"]
