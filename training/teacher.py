"""A text encoder as teacher: its embeddings, computed beforehand, are what texts shall mean from the first step on.

    parquet (text, embedding) ─ centred, principal axes ─ Teacher ─┬─ Batch.teacher_embeds ─ distillation_loss
                                                                   └─ first word embeddings of a new model

Two towers that start at random see nothing in each other for hundreds of steps, and words that few pictures have never
find their neighbours. A teacher that has read a lot of text places them all; the images then learn to meet them.
"""

from collections.abc import Sequence

import pyarrow.parquet
import torch
from torch import nn
from torch.nn import functional as F

from .recipe import RecipeError


class Teacher:
    """Embeddings of known texts, in `dimension` coordinates.

    The teacher's own space is centred, so that unrelated texts are orthogonal on average, and turned to its principal
    axes, of which the first `dimension` are kept: the best approximation of its inner products (Eckart and Young).

    Args:
        path: parquet file with the columns `text` and `embedding` (lists of equal length).
        dimension: of the student's embeddings.

    Raises:
        RecipeError: no such file, no such columns, or fewer coordinates than `dimension`.
    """

    def __init__(self, path: str, dimension: int):
        try:
            table = pyarrow.parquet.read_table(path, columns=["text", "embedding"])
        except (OSError, ValueError) as error:
            raise RecipeError(f"teacher={path!r} can't be read: {str(error).splitlines()[0]}") from None
        self.dimension = dimension
        self.rows = {text: row for row, text in enumerate(table["text"].to_pylist())}
        flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        embeddings = torch.tensor(flat, dtype=torch.float32).reshape(len(self.rows), -1)
        if embeddings.shape[1] < dimension:
            raise RecipeError(
                f"teacher={path!r} has {embeddings.shape[1]} coordinates, fewer than projection_dim={dimension}"
            )
        embeddings = embeddings - embeddings.mean(dim=0)
        axes = torch.linalg.eigh(embeddings.T @ embeddings).eigenvectors.flip(1)[:, :dimension]
        self.embeddings = F.normalize(embeddings @ axes, dim=1)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, dimension) float32, L2-normalised; zeros for a text that the teacher was not asked about."""
        rows = torch.tensor([self.rows.get(text, -1) for text in texts])
        return torch.where((rows >= 0)[:, None], self.embeddings[rows], 0.0)

    def initialise_words(self, word_embeddings: nn.Embedding, tokens: Sequence[str]):
        """Gives every token that the teacher knows a row like its embedding, as large as the random rows are.

        Args:
            word_embeddings: (vocabulary, width); rows of more than `dimension` coordinates end in zeros.
            tokens: the vocabulary in the order of its ids; WordPiece's `##` is taken off.
        """
        turn_words(word_embeddings, self.embed([token.removeprefix("##") for token in tokens]))


@torch.no_grad()
def turn_words(word_embeddings: nn.Embedding, known: torch.Tensor):
    """Turns the rows of words into the directions that a teacher gives them; they keep their length.

    Args:
        word_embeddings: (vocabulary, width).
        known: (words, dimension), the first so many words; zeros for those that stay as they are.
    """
    weight = word_embeddings.weight[: len(known)]
    width = min(known.shape[1], weight.shape[1])
    known = F.normalize(known[:, :width].to(weight), dim=1)
    size = weight.norm(dim=1, keepdim=True)
    found = (known.norm(dim=1) > 0) & (size[:, 0] > 0)
    weight[found] = F.pad(known * size, (0, weight.shape[1] - width))[found]


def distillation_loss(text_embeds: torch.Tensor, teacher_embeds: torch.Tensor) -> torch.Tensor:
    """Sum of 1 − cosine over the rows that the teacher knows, ().

    Args:
        text_embeds: (texts, dimension), L2-normalised.
        teacher_embeds: (texts, dimension), L2-normalised or zero.
    """
    known = teacher_embeds.square().sum(dim=1) > 0.5
    return ((1 - (text_embeds * teacher_embeds).sum(dim=1)) * known).sum()
