"""Top-k accuracy of a classifier, as an mmengine metric."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from ...backbones.registry import register_in_mmengine
from ...layers.arguments import check_whole_number


@register_in_mmengine(METRICS)
class TopKAccuracy(BaseMetric):
    """Measure the percentage of images whose class is among the k highest scores.

    Results are named ``accuracy/top1``, ``accuracy/top5``. A k that is not below the number of
    classes says nothing (it is 100 by definition), so its figure is left out. Scores that are not
    finite count as wrong.

    Args:
        topk: the values of k.
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5), **options) -> None:
        super().__init__(**options)
        if not isinstance(topk, (list, tuple)) or not topk:
            raise ValueError(f"topk is {topk!r}: a list of whole numbers is taken, such as (1, 5)")
        for k in topk:
            check_whole_number("an entry of topk", k, 1)
        self.topk = tuple(topk)

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Note, for each image, at which rank its class comes (0 is the highest score)."""
        for sample in data_samples:
            scores, label = sample["pred_scores"], int(sample["gt_label"])
            rank = len(scores)
            if scores.isfinite().all() and 0 <= label < len(scores):
                rank = int((scores > scores[label]).sum())
                # Of equal scores the lower index comes first, as argmax has it.
                rank += int((scores[:label] == scores[label]).sum())
            self.results.append((rank, len(scores)))

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        """Turn the ranks of all images into percentages.

        Raises:
            ValueError: no image was evaluated.
        """
        if not results:
            raise ValueError("no image was evaluated: check the data of the loop")
        num_classes = results[0][1]
        return {
            f"top{k}": 100 * sum(rank < k for rank, _ in results) / len(results)
            for k in self.topk
            if k < num_classes or k == 1
        }
