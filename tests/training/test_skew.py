"""What a head loses on other features than those of its training: measured on the same rows; refused if it counts."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attire.data.dataset import RowIndices, ViewIndices
from attire.errors import AttireError
from attire.training import skew

LABELS = np.arange(400) % 4


class Fixed:
    """One-hot features of these classes."""

    def __init__(self, classes: RowIndices) -> None:
        self.table = torch.eye(4)[torch.from_numpy(classes)]

    def batches(self, order: RowIndices, batch_size: int, views: ViewIndices | None) -> Iterator[Tensor]:
        yield self.table[torch.from_numpy(order)]


def found(changed: int) -> skew.Skew:
    """A perfect head, served features that turn the first `changed` rows into another class."""
    other = LABELS.copy()
    other[:changed] = (other[:changed] + 1) % 4
    return skew.Skew.measure(nn.Sequential(nn.Identity(), Same()), Fixed(LABELS), Fixed(other), LABELS, np.arange(400))


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_the_same_features_have_no_skew() -> None:
    same = found(0)
    assert (same.trained, same.served, same.same, same.change.value) == (1, 1, 1, 0)
    same.check("openvino-int8")


def test_a_loss_is_measured_and_refused() -> None:
    lossy = found(40)
    assert (lossy.trained, lossy.served, lossy.same) == (1, 0.9, 0.9)
    assert lossy.to_json()["change"][0] == pytest.approx(-0.1)
    with pytest.raises(AttireError, match=r"skew of openvino-int8: a bundle predicts in fp32, .* -10\.0 points"):
        lossy.check("openvino-int8")


def test_a_loss_that_could_be_none_is_borne() -> None:
    found(1).check("openvino-int8")


def test_rows_are_drawn_from_the_seed_and_fewer_at_a_large_size() -> None:
    rows = np.arange(100, 60_000)
    chosen = skew.sample_rows(rows, 224, 42)
    assert len(chosen) == 498
    assert set(chosen) <= set(rows)
    assert np.array_equal(chosen, skew.sample_rows(rows, 224, 42))
    assert len(skew.sample_rows(rows, 32, 42)) == skew._ROWS
    assert len(skew.sample_rows(rows[:7], 224, 42)) == 7
