"""A text encoder as teacher: text embeddings are trained towards its embeddings, which are computed beforehand.

    parquet (text, embedding) ─ centred, principal axes ─ Teacher ─┬─ Batch.teacher_embeds ─ distillation_loss
                                                                   └─ first word embeddings of a new model

Two random towers learn nothing from each other for hundreds of steps, and words with few images never find their
neighbours. A teacher that was trained on much text gives all words a place; the images then learn to meet them.
"""

from collections.abc import Sequence

import pyarrow.parquet
import torch
from torch import nn
from torch.nn import functional as F

from ..configuration_mome import quoted
from ..errors import RecipeError, first_line


class Teacher:
    """Embeddings of known texts, in `dimension` coordinates.

    The teacher's space is centred, so that unrelated texts are orthogonal on average, and rotated to its principal
    axes, of which the first `dimension` are kept: the best approximation of its inner products (Eckart and Young).

    Args:
        path: parquet file with the columns `text` and `embedding` (lists of equal length).
        dimension: of the student's embeddings.

    Raises:
        RecipeError: a file that can't be read or lacks a column, or embeddings of fewer dimensions than `dimension`.
    """

    def __init__(self, path: str, dimension: int):
        try:
            table = pyarrow.parquet.read_table(path, columns=["text", "embedding"])
        except (OSError, ValueError) as error:
            raise RecipeError(f"teacher={quoted(path)} can't be read: {first_line(error)}") from None
        self.dimension = dimension
        self.rows = {text: row for row, text in enumerate(table["text"].to_pylist())}
        flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        embeddings = torch.tensor(flat, dtype=torch.float32).reshape(len(self.rows), -1)
        if embeddings.shape[1] < dimension:
            raise RecipeError(
                f"teacher={quoted(path)} has {embeddings.shape[1]} dimensions, fewer than projection_dim={dimension}"
            )
        embeddings = embeddings - embeddings.mean(dim=0)
        axes = torch.linalg.eigh(embeddings.T @ embeddings).eigenvectors.flip(1)[:, :dimension]
        self.embeddings = F.normalize(embeddings @ axes, dim=1)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, dimension) float32, L2-normalised; zeros for a text that the file does not have."""
        rows = torch.tensor([self.rows.get(text, -1) for text in texts])
        return torch.where((rows >= 0)[:, None], self.embeddings[rows], 0.0)

    def initialise_words(self, word_embeddings: nn.Embedding, tokens: Sequence[str]):
        """Points the rows of tokens that the teacher knows in its direction; each row keeps its length.

        Args:
            word_embeddings: (vocabulary, width); a row wider than `dimension` ends in zeros.
            tokens: the vocabulary in the order of its ids; WordPiece's `##` is stripped.
        """
        turn_words(word_embeddings, self.embed([token.removeprefix("##") for token in tokens]))


@torch.no_grad()
def turn_words(word_embeddings: nn.Embedding, known: torch.Tensor):
    """Points the rows of words in the directions that a teacher gives them; each row keeps its length.

    Args:
        word_embeddings: (vocabulary, width).
        known: (words, dimension) of the first so many words; zeros for those that stay as they are.
    """
    weight = word_embeddings.weight[: len(known)]
    width = min(known.shape[1], weight.shape[1])
    known = F.normalize(known[:, :width].to(weight), dim=1)
    size = weight.norm(dim=1, keepdim=True)
    found = (known.norm(dim=1) > 0) & (size[:, 0] > 0)
    weight[found] = F.pad(known * size, (0, weight.shape[1] - width))[found]
