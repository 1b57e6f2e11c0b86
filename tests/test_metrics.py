"""Accuracies, importance and rank against values worked out by hand."""

import pytest
import torch

from funlora_lab import metrics


def test_accuracies_of_a_small_matrix():
    matrix = [[0.9], [0.8, 0.6], [0.7, 0.5, 0.3]]
    assert metrics.average_accuracies(matrix) == pytest.approx([0.9, 0.7, 0.5])
    assert metrics.last_accuracy(matrix) == pytest.approx(0.5)
    assert metrics.average_incremental_accuracy(matrix) == pytest.approx(0.7)


def test_importance_is_the_mean_distance_from_one():
    assert metrics.importance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0, 0.4])) == pytest.approx(0.7)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_numerical_rank_of_a_matrix_of_known_rank(rank):
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(20, rank, generator=generator), torch.randn(rank, 16, generator=generator)
    assert metrics.numerical_rank(left @ right) == rank
