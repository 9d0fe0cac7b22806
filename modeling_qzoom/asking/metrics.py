"""Measures of answers, gate and regions, and bootstrap intervals of them.

Boxes are (x0, y0, x1, y1) in source pixels, exclusive end. All shares are fractions in [0, 1].
"""

from collections.abc import Sequence

import numpy as np

from ..zoom_regions_qzoom import Rectangle


Truth = str | Sequence[str]

# least share of a target's area that a box has to cover to count as a hit
COVERED = 0.9


def _truths(truth: Truth) -> list[str]:
    truths = [truth] if isinstance(truth, str) else list(truth)
    if not truths:
        raise ValueError("An answer needs at least one truth to compare with.")
    return truths


def exact_match(answer: str, truth: Truth) -> bool:
    """Whether an answer equals the truth, or one of several; case and surrounding white space do not count.

    Raises:
        ValueError: an empty list of truths.
    """
    return any(answer.strip().lower() == one.strip().lower() for one in _truths(truth))


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance in characters: insertions, deletions and substitutions cost one each."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(answer: str, truth: Truth, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity in [0, 1] to the nearest truth, as DocVQA scores an answer.

    Args:
        threshold: A similarity has to exceed it, or counts 0: slips of reading score, wrong answers do not.

    Raises:
        ValueError: an empty list of truths.
    """
    best = 0.0
    given = " ".join(answer.lower().split())
    for one in _truths(truth):
        target = " ".join(one.lower().split())
        longest = max(len(given), len(target))
        similarity = 1.0 if longest == 0 else 1 - edit_distance(given, target) / longest
        best = max(best, similarity)
    return best if best > threshold else 0.0


def _number(text: str) -> float | None:
    """A decimal number or a percentage; None for anything else."""
    text = text.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(answer: str, truth: Truth, tolerance: float = 0.05) -> bool:
    """Whether an answer is within a share of the true number, or equals what is no number, as ChartQA scores it.

    Args:
        tolerance: Largest accepted deviation as a share of the truth; a truth of zero has to be met exactly.

    Raises:
        ValueError: an empty list of truths.
    """
    given = _number(answer)
    for one in _truths(truth):
        target = _number(one)
        if given is not None and target:
            if abs(given - target) <= tolerance * abs(target):
                return True
        elif exact_match(answer, one):
            return True
    return False


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative; ties count half.

    Args:
        scores: (n,) any monotone score.
        labels: (n,) True for positives.

    Raises:
        ValueError: no positive or no negative label.
    """
    positives, negatives = tied_counts(scores, labels)
    return float(roc_area(positives[None], negatives[None])[0])


def tied_counts(scores: Sequence[float], labels: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """(v,) positives and (v,) negatives at each distinct score, in ascending order."""
    positive = np.asarray(labels, dtype=bool)
    if positive.all() or not positive.any():
        raise ValueError("auroc needs at least one positive and one negative label.")
    values, place = np.unique(np.asarray(scores, dtype=float), return_inverse=True)
    counts = [np.bincount(place[side], minlength=len(values)) for side in (positive, ~positive)]
    return counts[0], counts[1]


def roc_area(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """(b,) areas from (b, v) counts at ascending scores."""
    below = negatives.cumsum(axis=1) - negatives
    wins = (positives * (below + negatives / 2)).sum(axis=1)
    return wins / (positives.sum(axis=1) * negatives.sum(axis=1))


def covered_share(box: Rectangle | None, target: Rectangle) -> float:
    """Share of the target's area that lies inside the box; 0 without a box."""
    if box is None:
        return 0.0
    width = min(box[2], target[2]) - max(box[0], target[0])
    height = min(box[3], target[3]) - max(box[1], target[1])
    area = (target[2] - target[0]) * (target[3] - target[1])
    return max(0.0, width) * max(0.0, height) / area


def is_covered(box: Rectangle | None, target: Rectangle) -> bool:
    """Whether a box covers enough of a target's area, `COVERED`, to count as a hit."""
    return covered_share(box, target) >= COVERED


def region_recall(boxes: Sequence[Rectangle | None], targets: Sequence[Rectangle]) -> float:
    """Share of targets that their boxes cover.

    Raises:
        ValueError: no targets.
    """
    if not targets:
        raise ValueError("region_recall needs at least one target.")
    hits = [is_covered(box, target) for box, target in zip(boxes, targets, strict=True)]
    return sum(hits) / len(hits)


def area_share(box: Rectangle, image_size: tuple[int, int]) -> float:
    """Area of a box as a share of the image's, whose size is (width, height)."""
    return (box[2] - box[0]) * (box[3] - box[1]) / (image_size[0] * image_size[1])
