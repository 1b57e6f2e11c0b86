"""A class tuned again on new images (Sec. 4.2): it changes, nothing else does by a bit, and a kill costs nothing."""

import shutil

import pytest
import torch

from funlora_lab import LabError, open_folder, open_run, preset, verify
from funlora_lab.continual import held_out_loss
from funlora_lab.errors import Stopped
from funlora_lab.store import fingerprint
from funlora_lab.studies.verification import compare_runs
from funlora_lab.training import Runtime


@pytest.fixture
def run(smoke_home, tmp_path):
    return open_run(preset("smoke"), "cpu", home=shutil.copytree(smoke_home, tmp_path / "home"))


def negatives(run, cls: int) -> torch.Tensor:
    return 255 - run.context.dataset.train.of(cls).pixels


def test_only_the_tuned_class_changes_and_the_certificate_of_the_run_still_holds(run):
    others = {cls: run.samples(cls) for cls in range(9)}
    before, row = run.samples(9), run.row(9)
    tuned = run.tune_class("9", negatives(run, 9))
    found = compare_runs(tuned, run)
    assert {(line["class"], line["what"]) for line in found.differences} == {("9", "adapter"), ("9", "images")}
    assert len(found.compared) == 1 + 4 + 10  # the backbone, the adapters of 6 to 9, images of all
    assert all(torch.equal(tuned.samples(cls), images) for cls, images in others.items())
    assert not torch.equal(tuned.samples(9), before)
    assert run.row(9) is row
    assert torch.equal(open_folder(run.run.folder, "cpu").samples(9), before)
    assert verify(run.run).unchanged


def test_tuning_lowers_the_loss_on_the_new_images_and_may_be_repeated(run):
    changed = run.context.dataset.valid
    changed.pixels.copy_(255 - changed.pixels)  # what is held out is now what the class will look like
    once = run.tune_class(9, negatives(run, 9))
    twice = once.tune_class(9, negatives(run, 9))
    loss = [held_out_loss(run.context, each.source(9), 9) for each in (run, once, twice)]
    assert loss[2] < loss[1] < loss[0]
    assert fingerprint(twice.row(9)) != fingerprint(once.row(9))


def test_a_tuning_that_is_stopped_again_and_again_ends_with_the_same_bits(run, smoke_home, tmp_path):
    expected, images = run.tune_class(8, negatives(run, 8)), negatives(run, 8)
    other = open_run(preset("smoke"), "cpu", home=shutil.copytree(smoke_home, tmp_path / "other"))
    stops, events = 0, []
    while True:
        left = iter(range(2))
        stop = lambda left=left: None if next(left, None) is not None else "Enough."  # noqa: E731
        again = open_folder(other.run.folder, "cpu")
        again.runtime = Runtime(stop=stop, report=events.append)
        try:
            tuned = again.tune_class(8, images)
            break
        except Stopped:
            stops += 1
    assert stops >= 2
    assert fingerprint(tuned.row(8)) == fingerprint(expected.row(8))
    assert tuned.generator.keys[8] == expected.generator.keys[8]
    assert torch.equal(tuned.samples(8), expected.samples(8))
    seen = [event["step"] for event in events if event["event"] == "loss" and "replayed" not in event]
    assert seen == [5, 8]  # every step was trained once: 128 images in batches of 16
    events.clear()
    open_folder(other.run.folder, "cpu").tune_class(8, images)
    assert not [event for event in events if "replayed" not in event]


def test_a_tuned_class_is_exported_and_takes_the_place_of_the_old_one(run, tmp_path):
    tuned = run.tune_class(9, negatives(run, 9))
    file = tuned.export_class(9, tmp_path / "nine.safetensors")
    run.remove_class(9)
    assert not [line for line in compare_runs(tuned, run).compared if line["class"] == "9"]
    assert run.import_class(file) == 9
    assert torch.equal(run.samples(9), tuned.samples(9))
    assert compare_runs(tuned, run).unchanged
    assert verify(run.run).unchanged


def test_what_cannot_be_tuned_is_refused_in_one_sentence(run):
    images = negatives(run, 9)
    for word, pixels, words in (
        ("0", images, "it was learned with the base itself"),
        ("none", images, "accepted are the classes of this run"),
        ("9", images.float(), r"Images float32 \(\d+, 1, 8, 8\): accepted are one or more of uint8 \(N, 1, 8, 8\)"),
        ("9", images[:, :, :4], r"accepted are one or more of uint8 \(N, 1, 8, 8\)"),
        ("9", images[:0], r"Images uint8 \(0, 1, 8, 8\)"),
    ):
        with pytest.raises(LabError, match=words):
            run.tune_class(word, pixels)
    naive = open_run(preset("smoke").but(method="fine-tune", score_after="none"), "cpu", home=run.run.folder.parent)
    with pytest.raises(LabError, match="fine-tune learns no class apart"):
        naive.tune_class("9", images)
