"""What the routing of a layer shows, in a few plain sentences.

picture ── patches ── kind of each: ground, edge or inside ──┐
                                                             ├─ "plain ground: mostly image 2 (15 of 16 patches)"
first choice of each patch ──────────────────────────────────┘
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from .engine import RoutedTokens

GROUND, EDGE, INSIDE = range(3)
KINDS = ("plain ground", "edges and lines", "plain insides")
PATCH_SIDE = 8  # pixels to which a patch is brought before it is looked at
SAME_COLOUR = 16.0  # of 255: colours that differ less look alike


def patch_kinds(picture: Image.Image, grid: int) -> np.ndarray:
    """(grid²,) int64, an index of `KINDS` for each patch, row by row.

    A patch of nearly one colour is ground if that is the colour of the picture's border (its median), else inside; a
    patch of several colours is an edge.
    """
    side = grid * PATCH_SIDE
    pixels = np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    # (grid, PATCH_SIDE, grid, PATCH_SIDE, 3) → (grid², PATCH_SIDE², 3)
    patches = pixels.reshape(grid, PATCH_SIDE, grid, PATCH_SIDE, 3).swapaxes(1, 2).reshape(grid**2, -1, 3)
    plain = patches.std(axis=1).max(axis=1) < SAME_COLOUR
    like_border = np.abs(patches.mean(axis=1) - np.median(border, axis=0)).max(axis=1) < SAME_COLOUR
    return np.where(plain, np.where(like_border, GROUND, INSIDE), EDGE)


def shared_information(kinds: np.ndarray, experts: np.ndarray) -> float:
    """How much a patch's expert tells of its kind: mutual information in bits (Shannon, 1948); 0 if nothing."""
    joint = np.zeros((len(KINDS), int(experts.max()) + 1))
    np.add.at(joint, (kinds, experts), 1 / len(kinds))
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    return float((joint[joint > 0] * np.log2(joint[joint > 0] / apart[joint > 0])).sum())


def explain(image: RoutedTokens, text: RoutedTokens, kinds: np.ndarray, layer: int, name: Callable) -> list[str]:
    """Sentences about one layer.

    Args:
        image: of a picture; its last tokens are the patches row by row, before them may be `[CLS]`.
        text: of its caption.
        kinds: of the patches, from `patch_kinds`.
        layer: from 0.
        name: group and expert → how the page calls the expert.
    """
    patches = image.experts[:, -len(kinds) :, 0]  # (layers, patches): first choices
    there = [kind for kind in range(len(KINDS)) if (kinds == kind).any()]
    told = [_told_of_kind(kind, patches[layer, kinds == kind], name) for kind in there]
    sentences = [f"{'; '.join(told)}.".capitalize()]
    if len(there) > 1:
        information = [shared_information(kinds, of_layer) for of_layer in patches]
        clearest = int(np.argmax(information))
        where = "in this layer" if clearest == layer else f"in layer {clearest + 1}"
        sentences.append(f"The experts tell these kinds of patch apart best {where}.")
    words = [index for index, token in enumerate(text.tokens) if not _is_special(token)]
    if words:
        sentences.append(_told_of_words([text.tokens[index] for index in words], text.experts[layer, words, 0], name))
    return sentences


def _told_of_kind(kind: int, experts: np.ndarray, name: Callable) -> str:
    """ "plain ground: mostly image 2 (15 of 16 patches)" """
    counts = np.bincount(experts)
    first, most = name("image", int(counts.argmax())), int(counts.max())
    if most == len(experts):
        return f"{KINDS[kind]}: all to {first} ({most} of {len(experts)} patches)"
    if 2 * most > len(experts):
        return f"{KINDS[kind]}: mostly to {first} ({most} of {len(experts)} patches)"
    return f"{KINDS[kind]}: spread, the most to {first} ({most} of {len(experts)} patches)"


def _is_special(token: str) -> bool:
    """[BOS], <s> and the like; not a lone bracket."""
    return len(token) > 2 and (token[0], token[-1]) in {("[", "]"), ("<", ">")}


def _told_of_words(words: Sequence[str], experts: np.ndarray, name: Callable) -> str:
    """ "Text 3 takes “a”, “circus”; text 4 takes “tent”." """
    told = []
    for expert in dict.fromkeys(experts.tolist()):
        taken = dict.fromkeys(word for word, other in zip(words, experts.tolist()) if other == expert)
        told.append(f"{name('text', expert)} takes {', '.join(f'“{word}”' for word in taken)}")
    sentence = "; ".join(told) + "."
    return sentence[:1].upper() + sentence[1:]
