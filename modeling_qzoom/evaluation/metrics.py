"""Measures of answers, gate and regions. Boxes are (x0, y0, x1, y1) in source pixels, exclusive end."""

from collections.abc import Sequence


Box = tuple[float, float, float, float]


def exact_match(answer: str, truth: str) -> bool:
    """Whether an answer equals the truth but for case and surrounding white space."""
    return answer.strip().lower() == truth.strip().lower()


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative; ties count half.

    Args:
        scores: (n,) any monotone score.
        labels: (n,) True for positives.
    """
    positives = sum(map(bool, labels))
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise ValueError("auroc needs at least one positive and one negative label.")
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    rank_sum, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        # tied scores share the mean of the ranks they occupy
        rank_sum += (start + 1 + end) / 2 * sum(bool(labels[i]) for i in order[start:end])
        start = end
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def covered_share(box: Box | None, target: Box) -> float:
    """Share of the target's area that lies inside the box; 0 without a box."""
    if box is None:
        return 0.0
    width = min(box[2], target[2]) - max(box[0], target[0])
    height = min(box[3], target[3]) - max(box[1], target[1])
    area = (target[2] - target[0]) * (target[3] - target[1])
    return max(0.0, width) * max(0.0, height) / area


def region_recall(boxes: Sequence[Box | None], targets: Sequence[Box], share: float = 0.9) -> float:
    """Share of targets of which at least `share` of the area is covered."""
    if not targets:
        raise ValueError("region_recall needs at least one target.")
    hits = [covered_share(box, target) >= share for box, target in zip(boxes, targets, strict=True)]
    return sum(hits) / len(hits)


def area_share(box: Box, image_size: tuple[int, int]) -> float:
    """Area of a box as a share of the image's, whose size is (width, height)."""
    return (box[2] - box[0]) * (box[3] - box[1]) / (image_size[0] * image_size[1])
