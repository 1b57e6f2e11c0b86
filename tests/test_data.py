"""Digits, class order and tasks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funlora_lab import data
from funlora_lab.errors import LabError
from funlora_lab.presets import preset
from funlora_lab.streams import Shuffle


@pytest.fixture(scope="module")
def digits():
    return data.load(preset("digits"))


def test_digits_are_divided_without_overlap_and_with_every_class_in_every_part(digits):
    parts = (digits.train, digits.valid, digits.test)
    assert sum(len(part) for part in parts) == 1797
    assert len(digits.test) == 360
    for part in parts:
        assert torch.bincount(part.labels, minlength=10).min() > 0
    assert round(len(digits.valid) / 1437, 2) == 0.15


def test_bytes_and_floats_are_inverse(digits):
    pixels = digits.test.pixels
    floats = data.to_floats(pixels)
    assert (floats.min().item(), floats.max().item()) == (-1, 1)
    assert torch.equal(data.to_bytes(floats), pixels)


def test_fingerprint_changes_with_one_pixel(digits):
    pixels = digits.train.pixels.clone()
    pixels[0, 0, 0, 0] += 1
    other = replace(digits, train=data.Images(pixels, digits.train.labels))
    assert other.fingerprint != digits.fingerprint


@given(st.integers(2, 30), st.integers(0, 5))
def test_tasks_cover_every_class_once(classes, seed):
    experiment = preset("digits").but(split="1-1", class_order=f"shuffled-{seed}")
    assert sorted(cls for task in data.tasks(experiment, classes) for cls in task) == list(range(classes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"split": "3-3"}, "split=3-3"), ({"split": "12-2"}, "split=12-2"), ({"class_order": "0,1,1"}, "class_order")],
)
def test_impossible_divisions_are_named(changes, words):
    with pytest.raises(LabError, match=words):
        data.tasks(preset("digits").but(**changes), 10)


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 20))
def test_shuffle_visits_every_item_once_a_pass(n, size, seed):
    shuffle = Shuffle(n, seed, "test")
    steps = -(-3 * n // size)
    visited = torch.cat([shuffle.batch(step, size) for step in range(steps)])[: 3 * n]
    for number in range(3):
        assert sorted(visited[number * n : (number + 1) * n].tolist()) == list(range(n))


def test_shuffle_gives_the_same_batch_without_the_ones_before():
    first = Shuffle(13, 0, "test")
    for step in range(40):
        batch = first.batch(step, 7)
    assert torch.equal(batch, Shuffle(13, 0, "test").batch(39, 7))
