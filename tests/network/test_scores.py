"""How near two networks' answers are."""

import torch

from dreamquant.network.scores import top1_agreement


def test_top1_agreement_counts_images() -> None:
    one = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0], [5.0, 4.0]])
    other = torch.tensor([[1.0, 9.0], [0.0, 1.0], [0.0, 0.1], [5.0, 4.9]])

    assert top1_agreement(one, other) == 75.0
    assert top1_agreement(one, one) == 100.0
