"""Guards that fire where a training is not sane, and signals."""

import math
import signal

import pytest
import torch

from attire.errors import AttireError, AttireWarning
from attire.progress import Epoch
from attire.training import guards
from tests.small_training import new_head


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As under nohup, where the end of the terminal is no reason to stop."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with guards.stop_requests():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is not before
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_first_loss_far_from_a_guess_is_a_warning() -> None:
    guards.check_first_loss(math.log(10), 10)
    for loss in (0.5, 9.0, float("nan")):
        with pytest.warns(AttireWarning, match=r"expected about ln\(10\) = 2.30"):
            guards.check_first_loss(loss, 10)


def test_a_parameter_that_does_not_change_is_an_error() -> None:
    head = new_head()
    before = guards.parameter_digests(head)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name != "3.bias":
                parameter.add_(1)
    with pytest.raises(AttireError, match=r"head\.3\.bias did not change in an epoch; it is not being trained"):
        guards.check_all_changed(before, head)


def test_a_parameter_that_is_no_longer_finite_is_an_error() -> None:
    head = new_head()
    before = guards.parameter_digests(head)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(float("nan"))
    with pytest.raises(AttireError, match=r"head\.0\.weight is no longer finite; lower --lr"):
        guards.check_all_changed(before, head)


def test_a_loss_that_does_not_fall_is_a_warning() -> None:
    flat = [Epoch(1, 1.0, None, None, 1.0), Epoch(2, 1.0, None, None, 1.0)]
    with pytest.warns(AttireWarning, match=r"the loss did not fall \(1.000 to 1.000\): lower --lr"):
        guards.check_loss_fell(flat)
    guards.check_loss_fell(flat[:1])
