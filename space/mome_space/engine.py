"""The model behind the tabs: one object embeds, captions, classifies, and tells which expert took what.

picture ── processor ── model ──┬─ embedding ── cosine with texts and pictures
                                ├─ generate(), plain and guided ── captions and their cosines
                                └─ router logits ── experts of every patch and token
"""

import hashlib
import inspect
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .limits import quoted, refuse

CAPTION_TOKENS = 20
PLAIN = {"guidance_scale": 1.0, "contrastive_weight": 0.0, "rerank_weight": 0.0}
RERANK_CANDIDATES = 4  # at least so many are compared when captions are re-ranked


@dataclass
class RoutedTokens:
    """Which experts the tokens of one group took.

    Attributes:
        group: `image` or `text`.
        tokens: a name for each token.
        experts: (layers, tokens, k) int, the likeliest first.
        weights: (layers, tokens, k) float, what each adds to the token.
    """

    group: str
    tokens: list[str]
    experts: np.ndarray
    weights: np.ndarray

    def shares(self, count: int) -> np.ndarray:
        """(layers, experts): the share of the group's assignments that each expert got; a row adds up to 1."""
        return expert_shares(self.experts, count)


def expert_shares(experts: np.ndarray, count: int) -> np.ndarray:
    """(layers, tokens, k) expert ids → (layers, experts) shares."""
    chosen = experts.reshape(len(experts), -1, 1) == np.arange(count)
    return chosen.mean(axis=1)


class Engine:
    """A captioner and its processor, safe to use from several threads.

    Args:
        model: `MomeForConditionalGeneration` or `CocaForConditionalGeneration`, in eval mode.
        processor: its `MomeProcessor`.
        captions: whether it has learnt to write captions.

    Attributes:
        guides: whether it writes several captions of a picture, and guided ones.
    """

    guides = True

    def __init__(self, model: Any, processor: Any, captions: bool = True):
        self.model, self.processor, self.config = model, processor, model.config
        if isinstance(model, torch.nn.Module):
            model.eval()
        self.captions = captions
        code = inspect.getmodule(type(processor))  # it may have come with the weights
        self._to_rgb, self._wordless = code.load_rgb_image, code.wordless_texts
        self._tokenizing = threading.Lock()  # a fast tokenizer can't be used and set up by two threads at a time

    @property
    def device(self) -> torch.device:
        return self.model.device

    # Embeddings.

    def rgb(self, picture: Image.Image | str) -> Image.Image:
        """A picture, or the file of one, as upright 8-bit RGB: what the model sees, before it is resized."""
        return self._to_rgb(picture)

    def prepare(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """Pictures and texts as the model's inputs."""
        with self._tokenizing:
            return self.processor(**inputs, return_tensors="pt").to(self.device)

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """(texts, projection_dim) float32, L2-normalised; what is too long is cut, see `count_tokens`."""
        inputs = self.prepare(text=texts, truncation=True)
        return self.model.get_text_features(**inputs).pooler_output.float().cpu().numpy()

    @torch.inference_mode()
    def embed_images(self, pictures: list[Image.Image]) -> np.ndarray:
        """(pictures, projection_dim) float32, L2-normalised."""
        inputs = self.prepare(images=pictures)
        return self.model.get_image_features(**inputs).pooler_output.float().cpu().numpy()

    def count_tokens(self, text: str) -> int:
        with self._tokenizing:
            return len(self.processor.tokenizer(text, verbose=False)["input_ids"])

    @property
    def max_tokens(self) -> int:
        """Longest text in tokens, `[BOS]` and `[EOS]` included."""
        return min(self.processor.tokenizer.model_max_length, self.config.max_position_embeddings)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """What the model reads of a text: texts of equal ids are one to it."""
        with self._tokenizing:
            return tuple(self.processor.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"])

    def check_words(self, text: str, what: str):
        """Refuses a text of which the tokenizer knows nothing: all such texts would have one embedding."""
        if self._wordless(self.processor.tokenizer, [self.token_ids(text)]):
            raise refuse(f"{what} {quoted(text)} has no word that the model knows: say it in English words.")

    def check_length(self, text: str, what: str):
        """Refuses a text that the model can't read to its end."""
        count = self.count_tokens(text)
        if count > self.max_tokens:
            raise refuse(f"{what} {quoted(text)} has {count} tokens, the model reads {self.max_tokens}: shorten it.")

    # Captions.

    @property
    def captions_without_picture(self) -> bool:
        """Whether captions can be compared with those without a picture, as classifier-free guidance does.

        CoCa has no tokens of the picture that could be left out.
        """
        return self.config.num_image_tokens > 0

    @torch.inference_mode()
    def caption(
        self, pictures: list[Image.Image], prompt: str = "", candidates: int = 3, **guidance: float
    ) -> list[list[tuple[str, float]]]:
        """Captions of each picture and their cosines with it, in the order of `generate()`: best first.

        Args:
            prompt: beginning of every caption.
            candidates: captions per picture.
            guidance: fields of `MomeGenerationConfig`; without any, beam search alone.
        """
        inputs = self.prepare(images=pictures, text=prompt, caption_prompt=True)
        room = self.config.max_position_embeddings - inputs["input_ids"].shape[1]
        if room < 1:
            raise refuse(f"The beginning {quoted(prompt)} leaves no room for a caption: shorten it.")
        guidance = {**PLAIN, **guidance}
        beams = max(candidates, RERANK_CANDIDATES if guidance["rerank_weight"] else 1)
        outputs = self.model.generate(
            **{key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")},
            **guidance,
            do_sample=False,
            num_beams=beams,
            rerank_candidates=beams if guidance["rerank_weight"] else None,
            num_return_sequences=candidates,
            max_new_tokens=min(CAPTION_TOKENS, room),
            output_cosine=True,
        )
        with self._tokenizing:
            texts = self.processor.post_process_image_text_to_text(outputs.sequences)
        scored = list(zip(texts, outputs.cosine.tolist()))
        return [scored[start : start + candidates] for start in range(0, len(scored), candidates)]

    # Labels.

    def classify(self, picture: Image.Image, labels: list[str], templates: list[str]) -> np.ndarray:
        """(labels,) probabilities, from the mean embedding of each label over the templates (2103.00020, 3.1.4).

        They are shares of 1 or, of a model with the sigmoid objective (SigLIP), each label's own.
        """
        texts = [template.replace("{}", label) for template in templates for label in labels]
        embeds = self.embed_texts(texts).reshape(len(templates), len(labels), -1).mean(axis=0)
        embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
        model = getattr(self.model, "model", self.model)
        logits = np.exp(float(model.logit_scale)) * (embeds @ self.embed_images([picture])[0])
        if (bias := getattr(model, "logit_bias", None)) is not None:
            return 1 / (1 + np.exp(-logits - float(bias)))
        exponentials = np.exp(logits - logits.max())
        return exponentials / exponentials.sum()

    # Routing.

    @property
    def routes(self) -> bool:
        """Whether there are experts at all: CoCa has none."""
        return hasattr(self.config, "experts_per_token")

    @property
    def experts(self) -> int:
        """Experts of one group; with one, the modality alone decides."""
        return self.config.experts_per_group

    @property
    def _caption_group(self) -> str:
        return getattr(self.config, "caption_group", "text")  # older checkpoints have text experts for captions, too

    @torch.inference_mode()
    def route(self, picture: Image.Image, caption: str) -> tuple[RoutedTokens, RoutedTokens]:
        """The experts of the picture's and the caption's tokens in the caption pass."""
        inputs = self.prepare(images=[picture], text=[caption], truncation=True)
        ids = inputs["input_ids"][0].tolist()
        with self._tokenizing:
            tokenizer = self.processor.tokenizer
            words = [tokenizer.decode([id]).strip() or tokenizer.convert_ids_to_tokens(id) for id in ids]
        patches = [
            f"row {index // self.config.grid_size + 1}, column {index % self.config.grid_size + 1}"
            for index in range(self.config.grid_size**2)
        ]
        patches = ["[CLS]", *patches][-self.config.num_image_tokens :]  # not every model has a [CLS]
        image, text = self._experts(self._routed_pass(inputs), len(patches), len(ids))
        return RoutedTokens("image", patches, *image), RoutedTokens("text", words, *text)

    def _routed_pass(self, inputs: dict[str, torch.Tensor]) -> Any:
        names = ("pixel_values", "input_ids", "attention_mask")
        return self.model(**{name: inputs[name] for name in names}, output_router_logits=True, logits_to_keep=1)

    def _experts(self, outputs: Any, image_tokens: int, text_tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of the image and the text group: expert ids and weights, (layers, tokens, k) each, of the first row."""
        layers = self.config.num_hidden_layers
        if not outputs.router_logits:  # one expert a group: nothing to choose
            shapes = ((layers, image_tokens, 1), (layers, text_tokens, 1))
            return [(np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=np.float32)) for shape in shapes]
        routed = []
        for group in ("image", self._caption_group):
            logits = torch.stack([layer[group][0] for layer in outputs.router_logits]).float()
            weights, experts = logits.softmax(dim=-1).topk(self.config.experts_per_token, dim=-1)
            if self.config.experts_per_token > 1:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            routed.append((experts.cpu().numpy(), weights.cpu().numpy()))
        return routed

    # The gallery.

    @torch.inference_mode()
    def embed_pairs(
        self, pictures: list[Image.Image], names: list[str]
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Embeddings (pictures, projection_dim), and how often each expert was chosen, (layers, experts) per group.

        Names of which the tokenizer knows no word are not counted.
        """
        known = self._known(names)
        names = [name if is_known else "" for name, is_known in zip(names, known.tolist())]
        inputs = self.prepare(images=pictures, text=names, truncation=True)
        outputs = self._routed_pass(inputs)
        embeds = outputs.image_embeds.float().cpu().numpy()
        if not outputs.router_logits:
            return embeds, None, None
        counts, k = [], self.config.experts_per_token
        words = inputs["attention_mask"].bool() & known[:, None].to(self.device)
        for group, mask in (("image", None), (self._caption_group, words)):
            chosen = torch.stack([layer[group].topk(k, dim=-1).indices for layer in outputs.router_logits])
            one_hot = torch.nn.functional.one_hot(chosen, self.experts).sum(dim=3)
            one_hot = one_hot if mask is None else one_hot * mask[None, :, :, None]
            counts.append(one_hot.sum(dim=(1, 2)).cpu().numpy())
        return embeds, *counts

    def _known(self, names: list[str]) -> torch.Tensor:
        """(names,) bool: whether the tokenizer knows a word of each."""
        tokenizer = self.processor.tokenizer
        with self._tokenizing:
            rows = tokenizer(names, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([any(token != tokenizer.unk_token_id for token in row) for row in rows])

    def fingerprint(self) -> str:
        """Hexadecimal digest of the weights and of how pictures are prepared."""
        digest = hashlib.sha256()
        for part in self._weights():
            digest.update(part)
        settings = self.processor.image_processor.to_dict()
        names = ("size", "image_mean", "image_std", "resample", "do_center_crop", "trim_to_margin")
        kept = {key: settings.get(key) for key in names}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def _weights(self) -> Iterator[bytes | memoryview]:
        for name, tensor in sorted(self.model.state_dict().items()):
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            yield from _byte_parts(tensor)


def _byte_parts(tensor: torch.Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    yield memoryview(flat)
