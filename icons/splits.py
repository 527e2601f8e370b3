"""Which icon goes where: held-out concepts, held-out sets, and no look-alike on both sides.

train                 what models learn from
validation, test      concepts that train never shows and never names; choose on the one, report on the other
healthicons-train     an unseen set to adapt to, and the rest of it (other concepts) to measure
healthicons-test
freehand              an unseen hand-drawn set
"""

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256

import numpy as np

from .licences import HELD_OUT_SETS
from .naming import concept_key

SPLITS = ("train", "validation", "test", "healthicons-train", "healthicons-test", "freehand")
# A look-alike keeps its place in the first of these and leaves the later ones.
PRECEDENCE = ("test", "validation", "healthicons-test", "freehand", "healthicons-train", "train")
HASH_BITS = 256
# Chosen by looking at pairs: up to 6 bits apart is the same drawing, up to 24 is a candidate that the ink has to
# confirm; above 6 % of the ink, pairs such as "truck minus" and "truck plus" begin, which are not the same. A picture
# that is symmetric to the pixel has frequencies of zero and so fewer bits set than half: all flags of three stripes
# have nearly the same hash, which then never decides alone.
SAME_BITS = 6
TELLING_BITS = 100  # at least so many are set in a hash that may decide alone
NEAR_BITS = 24
NEAR_INK = 6  # per cent


def concept_hash(name: str) -> int:
    """SHA-256 of the concept, as a number."""
    return int.from_bytes(sha256(concept_key(name).encode()).digest(), "big")


def is_held_out(name: str) -> bool:
    """Whether a concept is held out everywhere: one in twenty."""
    return concept_hash(name) % 20 == 0


def assign_split(icon_set: str, name: str) -> str:
    """The split of an icon, a function of its set and its concept alone.

    Args:
        icon_set: identifier of the set, for example `mdi`.
        name: the cleaned name.
    """
    number = concept_hash(name)
    family = HELD_OUT_SETS.get(icon_set)
    if family == "healthicons":  # concepts that are held out everywhere are so here too
        return "healthicons-test" if number % 20 == 0 or number % 5 == 1 else "healthicons-train"
    if family:
        return family
    if number % 20:
        return "train"
    return "test" if (number // 20) % 2 else "validation"


def near_pairs(hashes: np.ndarray, others: np.ndarray, bits: int = NEAR_BITS, block: int = 1024) -> np.ndarray:
    """Pairs of pictures whose perceptual hashes differ in few bits.

    Args:
        hashes, others: uint8, (pictures, 32).
        bits: largest Hamming distance.
        block: rows compared at a time, a matter of memory.

    Returns:
        int64, (pairs, 2): a row of `hashes` and a row of `others`.
    """
    # As signs, the product of two hashes is bits - 2 * distance: one matrix product instead of counting bits.
    left, right = _signs(hashes), _signs(others)
    found = [np.empty((0, 2), np.int64)]
    for start in range(0, len(left), block):
        rows, columns = np.nonzero(left[start : start + block] @ right.T >= HASH_BITS - 2 * bits)
        found.append(np.stack([rows + start, columns], axis=1))
    return np.concatenate(found)


def _signs(hashes: np.ndarray) -> np.ndarray:
    return np.unpackbits(hashes, axis=1).astype(np.float32) * 2 - 1


def look_alikes(
    splits: Sequence[str], hashes: np.ndarray, ink: Callable[[np.ndarray], np.ndarray], tolerance: int = NEAR_INK
) -> np.ndarray:
    """Marks the pictures that look like one of a split with precedence.

    Args:
        splits: split of each picture.
        hashes: uint8, (pictures, 32).
        ink: gives the pictures of some indices, 0 for white to 255 for black, integers, (pictures, side, side).
        tolerance: largest share of the ink in which two look-alikes differ, in per cent.

    Returns:
        bool, (pictures,): true for those to be dropped.
    """
    labels = np.asarray(splits)
    telling = np.bitwise_count(hashes).sum(axis=1) >= TELLING_BITS
    drop = np.zeros(len(labels), bool)
    for position, split in enumerate(PRECEDENCE[1:], start=1):
        candidates = np.flatnonzero(labels == split)
        keepers = np.flatnonzero(np.isin(labels, PRECEDENCE[:position]) & ~drop)
        pairs = near_pairs(hashes[candidates], hashes[keepers])
        for start in range(0, len(pairs), 8192):
            mine, theirs = candidates[pairs[start : start + 8192, 0]], keepers[pairs[start : start + 8192, 1]]
            # Integers, so that what stays does not depend on the order in which a machine adds.
            first, second = ink(mine).astype(np.int64), ink(theirs).astype(np.int64)
            apart = np.abs(first - second).sum(axis=(1, 2))
            confirmed = 100 * apart <= tolerance * np.maximum(first, second).sum(axis=(1, 2))
            same = np.bitwise_count(hashes[mine] ^ hashes[theirs]).sum(axis=1) <= SAME_BITS
            drop[mine[confirmed | (same & telling[mine] & telling[theirs])]] = True
    return drop


def repetitions(keys: Iterable[tuple[str, bytes]]) -> np.ndarray:
    """Marks every picture whose name and pixels occurred before.

    Args:
        keys: name and PNG of each picture.
    """
    seen: set[tuple[str, bytes]] = set()
    marks = []
    for key in keys:
        marks.append(key in seen)
        seen.add(key)
    return np.asarray(marks, bool)
