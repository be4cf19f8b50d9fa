"""Answers: their order, their verdict, their words."""

import subprocess
import sys

import numpy as np

from attire.inference.prediction import Prediction


def test_the_likeliest_class_comes_first_and_equals_keep_their_order() -> None:
    answer = Prediction.from_probabilities(("a", "b", "c"), np.array([0.2, 0.6, 0.2], np.float32))
    assert [label for label, _ in answer.ranking] == ["b", "a", "c"]
    assert (answer.label, round(answer.probability, 3)) == ("b", 0.6)
    assert (answer.distance, answer.out_of_distribution) == (None, None)


def test_a_verdict_needs_a_distance_and_a_threshold() -> None:
    p = np.array([0.9, 0.1])
    pairs = ((2, 3), (3, 3), (4, 3), (4, None), (None, 3))
    answers = [Prediction.from_probabilities("ab", p, distance, threshold) for distance, threshold in pairs]
    verdicts = [answer.out_of_distribution for answer in answers]
    assert verdicts == [False, False, True, None, None]


def test_its_words() -> None:
    assert str(Prediction("Bag", 0.98765, (("Bag", 0.98765),))) == "Bag 0.988"
    ten = tuple((name, 0.1) for name in "abcdefghij")
    assert str(Prediction("Bag", 0.41, ten, 9.0, True)) == "none of the ten (closest: Bag 0.41)"
    assert str(Prediction("Bag", 0.41, ten * 2, 9.0, True)) == "none of the 20 (closest: Bag 0.41)"


def test_torch_is_not_imported() -> None:
    run = "from attire.inference import predict, prediction, runtimes; import sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", run]).returncode == 0
