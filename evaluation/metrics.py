"""Retrieval, zero-shot and caption metrics as pure functions of tensors and strings. All are shares in 0…1."""

import re
from collections import Counter
from collections.abc import Sequence

import torch

WORD = re.compile(r"\w+")


def retrieval_recall(
    similarity: torch.Tensor, positives: torch.Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Share of queries with one of their positives among the k most similar candidates.

    Ties count against the query: a candidate as similar as the best positive ranks before it.

    Args:
        similarity: (queries, candidates).
        positives: (queries, candidates) bool; queries without a positive are left out.

    Returns:
        k → recall at k.
    """
    asked = positives.any(dim=1)
    if not asked.any():
        raise ValueError("no query has a positive candidate")
    similarity, positives = similarity[asked], positives[asked]
    best = similarity.masked_fill(~positives, -torch.inf).amax(dim=1, keepdim=True)
    rank = ((similarity >= best) & ~positives).sum(dim=1)
    return {k: (rank < k).float().mean().item() for k in ks}


LEAST_PICTURES = 3  # of which a broader word must be true to be asked for


def broader_words(related: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which words a pool of pictures can be asked for, and what is a right answer.

    Args:
        related: (words, pictures) bool, whether a word is true of a picture as a broader word or synonym.
        own: (words, pictures) bool, whether it is a text of the picture itself; then it is no right answer.

    Returns:
        (words,) bool, those that are true of at least `LEAST_PICTURES`; (words, pictures) bool.
    """
    wanted = related & ~own
    return wanted.sum(dim=1) >= LEAST_PICTURES, wanted


def r_precision(
    similarity: torch.Tensor, positives: torch.Tensor, most: int = 10, ignored: torch.Tensor | None = None
) -> float:
    """Mean over queries of the share of positives among the n most similar candidates, n the number of positives.

    Manning, Raghavan and Schütze, "Introduction to Information Retrieval" (2008), section 8.4.

    Args:
        similarity: (queries, candidates).
        positives: (queries, candidates) bool, at least one for each query.
        most: largest n.
        ignored: (queries, candidates) bool, candidates that are neither wanted nor wrong; `None`: none.
    """
    if ignored is not None:
        similarity = similarity.masked_fill(ignored, -torch.inf)
    if not positives.any(dim=1).all():
        raise ValueError("a query has no positive candidate")
    counts = positives.sum(dim=1).clamp(max=most)
    top = similarity.topk(int(counts.max()), dim=1).indices  # (queries, n)
    hits = positives.gather(1, top) & (torch.arange(top.shape[1], device=top.device) < counts[:, None])
    return (hits.sum(dim=1) / counts).mean().item()


def zero_shot_accuracy(
    similarity: torch.Tensor, labels: torch.Tensor, classes: int, ks: Sequence[int] = (1, 5), seed: int = 0
) -> dict[int, float]:
    """Accuracy of choosing among `classes` texts: the image's own and others, drawn at random with a fixed seed.

    Args:
        similarity: (images, texts).
        labels: (images,) index of each image's own text.
        classes: how many texts to choose from; all of them if there are fewer.

    Returns:
        k → share of images whose own text is among the k most similar.
    """
    images, texts = similarity.shape
    classes = min(classes, texts)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(images, texts, generator=generator)
    order[torch.arange(images), labels] = -1  # the own text is always among the chosen
    chosen = order.argsort(dim=1)[:, :classes]
    own = similarity.gather(1, labels[:, None])
    rank = (similarity.gather(1, chosen)[:, 1:] >= own).sum(dim=1)
    return {k: (rank < k).float().mean().item() for k in ks}


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def exact_match(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of captions that have the same words as one of their references, in the same order."""
    hits = [
        any(words_of(caption) == words_of(reference) for reference in own)
        for caption, own in zip(captions, references, strict=True)
    ]
    return sum(hits) / len(hits)


def token_f1(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over captions of the F1 of their words (as multisets) against the closest reference (SQuAD, 1606.05250)."""

    def f1(caption: str, reference: str) -> float:
        ours, theirs = Counter(words_of(caption)), Counter(words_of(reference))
        common = (ours & theirs).total()
        return 2 * common / max(ours.total() + theirs.total(), 1)

    best = [max(f1(caption, each) for each in own) for caption, own in zip(captions, references, strict=True)]
    return sum(best) / len(best)


def bleu4_and_cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-4 and CIDEr of the COCO caption evaluation, over lower-case words without punctuation.

    pycocoevalcap's own tokenizer needs Java; only its scorers are used.

    Raises:
        ModuleNotFoundError: pycocoevalcap is not installed; the extra `eval` has it.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    ours = {index: [" ".join(words_of(caption))] for index, caption in enumerate(captions)}
    theirs = {index: [" ".join(words_of(each)) for each in own] for index, own in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(theirs, ours, verbose=0)
    cider, _ = Cider().compute_score(theirs, ours)
    return {"bleu4": float(bleu[3]), "cider": float(cider)}
