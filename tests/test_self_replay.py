"""Self-replay: what it trains on, that its cost grows, and that what the loop reports of each task adds up."""

import shutil
from dataclasses import replace

import pytest
import torch

from funlora_lab import continual, open_run, preset
from funlora_lab.errors import Stopped
from funlora_lab.systems import SelfReplay, WholeNetwork
from funlora_lab.training import Runtime

EXPERIMENT = preset("smoke").but(method="self-replay")


@pytest.fixture(scope="module")
def home(smoke_home, tmp_path_factory):
    return shutil.copytree(smoke_home, tmp_path_factory.mktemp("own") / "home")


@pytest.fixture(scope="module")
def replayed(home):
    return open_run(EXPERIMENT, "cpu", home=home)


@pytest.fixture(scope="module")
def funlora(home):
    return open_run(preset("smoke"), "cpu", home=home)


def test_it_shares_the_base_with_funlora_and_trains_more_at_every_task(replayed, funlora):
    stages = [event for event in replayed.events if event["event"] == "loss" and event["step"] == event["steps"]]
    images = {event["stage"]: event["images"] for event in stages if event["stage"] != "classifier"}
    assert images == {"base": 640, "self-replay-2": 8 * 128, "self-replay-3": 10 * 128}
    assert replayed.generator_after(1).key == funlora.generator_after(1).key


def test_the_key_of_the_base_leaves_out_what_only_adapters_depend_on(replayed):
    other = SelfReplay(replace(replayed.context, experiment=EXPERIMENT.but(lora_attention_rank=2)))
    other.learn(0)
    assert other.key == replayed.generator_after(1).key


def test_it_trains_on_its_own_samples_of_old_classes_and_on_real_images_of_new_ones(replayed, monkeypatch):
    seen, train = {}, WholeNetwork.train

    def spy(self, name, labels, images, steps, **inputs):
        seen[name] = images
        return train(self, name, labels, images, steps, **inputs)

    monkeypatch.setattr(WholeNetwork, "train", spy)
    replayed.generator_after(3)
    before = replayed.samples_after(2)
    images, dataset = seen["self-replay-3"], replayed.context.dataset
    for cls, drawn in before.items():
        pool = {image.numpy().tobytes() for image in drawn}
        assert {image.numpy().tobytes() for image in images.of(cls).pixels} == pool
        assert not pool & {image.numpy().tobytes() for image in dataset.train.of(cls).pixels}
    for cls in replayed.tasks[2]:
        mine, real = images.of(cls).pixels, dataset.train.of(cls).pixels
        assert torch.equal(mine.flatten(1).unique(dim=0), real.flatten(1).unique(dim=0))
    sizes = {len(images.of(cls)) for cls in range(10)}
    assert sizes == {max(len(dataset.train.of(cls)) for cls in replayed.tasks[2])}  # every class as often


def test_old_classes_change_with_every_task_and_those_of_funlora_never_do(replayed, funlora):
    assert not torch.equal(replayed.samples_after(1)[0], replayed.samples_after(2)[0])
    for cls, images in funlora.samples_after(1).items():
        assert torch.equal(images, funlora.samples(cls))


def test_recognition_is_reported_of_every_class_seen_after_every_task(replayed, funlora):
    for run in (replayed, funlora):
        table, last = run.recognition, run.results["recognition_per_class"]
        assert table.notna().sum().tolist() == [6, 8, 10]
        assert table[3].to_dict() == {run.classes[int(cls)]: share for cls, share in last.items()}
    kept = funlora.recognition
    for task in (2, 3):
        old = kept[task - 1].notna()
        assert kept[task][old].equals(kept[task - 1][old])


def test_the_seconds_of_the_tasks_add_up_to_those_of_the_run(replayed, funlora):
    for run, images in ((replayed, [640, 8 * 128, 10 * 128]), (funlora, [640, 256, 256])):
        costs = run.costs
        assert costs["new classes"].tolist() == [6, 2, 2]
        assert costs["images"].tolist() == images
        seconds = costs[["train", "sample", "classify"]]
        assert seconds.to_numpy().sum() == pytest.approx(run.results["seconds"], abs=0.01)
        assert (seconds > 0).all().all()


def test_an_interrupted_self_replay_goes_on_and_ends_the_same(replayed, smoke_home, tmp_path):
    home, questions, done = shutil.copytree(smoke_home, tmp_path / "own"), iter(range(10**6)), []
    stop = Runtime(stop=lambda: "enough" if next(questions) == 20 else None, report=done.append)
    with pytest.raises(Stopped):
        continual.run(EXPERIMENT, runtime=stop, home=home)
    assert done[-1]["stage"] == "self-replay-2"
    results = continual.run(EXPERIMENT, home=home)
    for name in ("accuracy", "recognition_per_class", "confusion", "flow_loss"):
        assert results[name] == replayed.results[name], name
