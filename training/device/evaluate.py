"""How well pictures and texts of some splits find each other, all on the device.

A pool holds one picture each of up to so many names, the same for a split wherever it is measured.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ...evaluation.metrics import (
    broader_words,
    exact_match,
    r_precision,
    retrieval_recall,
    token_f1,
    zero_shot_accuracy,
)
from ...icons.drawing import draw_plain
from ...icons.phrases import ICON_OF, Phrases, bare_texts, framed_texts
from ...icons.tensors import IconTensors

CLASSES = 100  # that a picture's name is chosen from
CAPTIONED = 500  # pictures that get a caption


class Evaluator:
    """Evaluates captioners on one data set.

    Args:
        icons, phrases: on the device of the captioners.
        processor: reads captions.
        scale: pictures in 0…1 → pixel values.
        pool: names that a split is asked for at most.
    """

    def __init__(self, icons: IconTensors, phrases: Phrases, processor, scale, pool: int, batch_size: int = 512):
        self.icons, self.phrases, self.processor, self.scale = icons, phrases, processor, scale
        self.pool, self.batch_size = pool, batch_size

    @torch.no_grad()
    def run(self, captioner: nn.Module, splits: Sequence[str]) -> dict[str, float]:
        """Metric → figure in 0…1, and `pictures`: how many there were; captioner in evaluation mode."""
        rows = self.rows(splits)
        names = self.icons.name[rows].long()
        images = self._images(captioner, rows)
        figures: dict[str, float] = {"pictures": len(rows)}
        same = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        for way, lead in (("name", None), ("sentence", ICON_OF)):
            similarity = images @ self._texts(captioner, names, lead).T
            for direction, scores in (("image to text", similarity), ("text to image", similarity.T)):
                recall = retrieval_recall(scores, same, ks=(1, 10))
                figures |= {f"{way}, {direction}, R@{k}": value for k, value in recall.items()}
            if lead is None:
                labels = torch.arange(len(rows))
                figures["zero-shot"] = zero_shot_accuracy(similarity.cpu(), labels, CLASSES, ks=(1,))[1]
        return figures | self._broader(captioner, rows, images) | self._captions(captioner, rows[:CAPTIONED])

    def rows(self, splits: Sequence[str]) -> torch.Tensor:
        """int64 rows of the pool: the first picture of each name in an order that is always the same."""
        rows = self.icons.rows_of(splits).cpu()
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        first: dict[int, int] = {}
        for row, name in zip(rows.tolist(), self.icons.name.cpu()[rows].tolist()):
            first.setdefault(name, row)
        return torch.tensor(list(first.values())[: self.pool], device=self.icons.device)

    def _images(self, captioner: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        parts = [self.scale(draw_plain(self.icons, part)) for part in rows.split(self.batch_size)]
        return torch.cat([captioner.get_image_features(part).pooler_output.float() for part in parts])

    def _texts(self, captioner: nn.Module, texts: torch.Tensor, lead: str | None = None) -> torch.Tensor:
        length, embeds = captioner.config.max_position_embeddings, []
        for part in texts.split(self.batch_size):
            made = (
                bare_texts(self.icons, self.phrases, part, length)
                if lead is None
                else framed_texts(self.icons, self.phrases, part, lead, length)
            )
            embeds.append(captioner.get_text_features(made.input_ids, made.attention_mask).pooler_output.float())
        return torch.cat(embeds)

    def _broader(self, captioner: nn.Module, rows: torch.Tensor, images: torch.Tensor) -> dict[str, float]:
        """R-precision of broader words and synonyms of the pool's names, as `mome.experiments.icons` has it."""
        related, own = self.icons.related[self.icons.name[rows].long()].long(), self.icons.own[rows].long()
        words = related[related >= 0].unique()
        # (words, pictures)
        true_of, named = ((words[:, None, None] == texts).any(dim=2) for texts in (related, own))
        asked, wanted = broader_words(true_of, named)
        if not asked.any():
            return {}
        similarity = self._texts(captioner, words[asked]) @ images.T
        precision = r_precision(similarity, wanted[asked], ignored=named[asked])
        return {"broader word, R-precision": precision, "broader words": int(asked.sum())}

    def _captions(self, captioner: nn.Module, rows: torch.Tensor) -> dict[str, float]:
        """Greedy captions against the names and tags of each picture."""
        longest = captioner.config.max_position_embeddings - 1
        captions = []
        for part in rows.split(self.batch_size):
            pixel_values = self.scale(draw_plain(self.icons, part))
            ids = captioner.generate(pixel_values=pixel_values, do_sample=False, num_beams=1, max_new_tokens=longest)
            captions += self.processor.post_process_image_text_to_text(ids)
        references = [[self.icons.texts[text] for text in row if text >= 0] for row in self.icons.own[rows].tolist()]
        return {"caption F1": token_f1(captions, references), "caption exact": exact_match(captions, references)}
