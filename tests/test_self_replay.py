"""Self-replay: what it trains on, that its cost grows, and that what the loop reports of each task adds up."""

from dataclasses import replace

import pytest
import torch

from funlora_lab.generators import SelfReplay
from funlora_lab.network import WholeNetwork
from funlora_lab.opened import exhaust, open_run
from funlora_lab.presets import preset


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def replayed(home):
    return open_run(preset("smoke").but(method="self-replay", samples_per_class=12), "cpu", home=home)


@pytest.fixture(scope="module")
def funlora(home):
    return open_run(preset("smoke").but(samples_per_class=12), "cpu", home=home)


def test_it_shares_the_base_with_funlora_and_trains_more_at_every_task(replayed, funlora):
    stages = [event for event in replayed.events if event["event"] == "loss" and event["step"] == event["steps"]]
    images = {event["stage"]: event["images"] for event in stages if event["stage"] != "classifier"}
    assert images == {"base": 640, "self-replay-2": 8 * 128, "self-replay-3": 10 * 128}
    first = replayed.learner_after(1)
    assert first.key == funlora.learner_after(1).key


def test_the_key_of_the_base_leaves_out_what_only_adapters_depend_on(replayed):
    other = SelfReplay(replace(replayed.work, experiment=replayed.experiment.but(lora_attention_rank=2)))
    exhaust(other.learn(0))
    assert other.key == replayed.learner_after(1).key


def test_it_trains_on_its_own_samples_of_old_classes_and_on_real_images_of_new_ones(replayed, monkeypatch):
    seen = {}

    def spy(self, name, labels, images, steps, **inputs):
        seen[name] = images
        return real(self, name, labels, images, steps, **inputs)

    real = WholeNetwork.train
    monkeypatch.setattr(WholeNetwork, "train", spy)
    replayed.learner_after(3)
    before = replayed.samples_after(2)
    images, dataset = seen["self-replay-3"], replayed.work.dataset
    for cls, drawn in before.items():
        pool = {image.numpy().tobytes() for image in drawn}
        mine = images.of(cls).pixels
        assert {image.numpy().tobytes() for image in mine} == pool
        assert not pool & {image.numpy().tobytes() for image in dataset.train.of(cls).pixels}
    for cls in replayed.tasks[2]:
        mine, real_ones = images.of(cls).pixels, dataset.train.of(cls).pixels
        assert torch.equal(mine.flatten(1).unique(dim=0), real_ones.flatten(1).unique(dim=0))
    sizes = {len(images.of(cls)) for cls in range(10)}
    assert sizes == {max(len(dataset.train.of(cls)) for cls in replayed.tasks[2])}  # every class as often


def test_old_classes_change_with_every_task_and_those_of_funlora_never_do(replayed, funlora):
    assert not torch.equal(replayed.samples_after(1)[0], replayed.samples_after(2)[0])
    for cls, images in funlora.samples_after(1).items():
        assert torch.equal(images, funlora.samples(cls))


def test_recognition_is_reported_of_every_class_seen_after_every_task(replayed, funlora):
    for opened in (replayed, funlora):
        table = opened.recognition
        assert table.notna().sum().tolist() == [6, 8, 10]
        assert table[3].to_dict() == {
            opened.classes[int(cls)]: share for cls, share in opened.results["recognition_per_class"].items()
        }
    kept = funlora.recognition
    for task in (2, 3):
        old = kept[task - 1].notna()
        assert kept[task][old].equals(kept[task - 1][old])


def test_the_seconds_of_the_tasks_add_up_to_those_of_the_run(replayed, funlora):
    for opened in (replayed, funlora):
        costs = opened.costs
        assert costs["new classes"].tolist() == [6, 2, 2]
        assert costs["images"].tolist() == ([640, 8 * 128, 10 * 128] if opened is replayed else [640, 256, 256])
        total = costs[["train", "sample", "classify"]].to_numpy().sum()
        assert total == pytest.approx(opened.results["seconds"], abs=0.01)
        assert (costs[["train", "sample", "classify"]] > 0).all().all()


def test_an_interrupted_self_replay_goes_on_and_ends_the_same(replayed, home, tmp_path):
    from funlora_lab import continual
    from funlora_lab.errors import Stopped
    from funlora_lab.training import Runtime

    stops = iter(range(10**6))
    experiment = replayed.experiment
    runtime = Runtime(stop=lambda: "enough" if next(stops) == 130 else None)
    with pytest.raises(Stopped):
        list(continual.run(experiment, runtime, tmp_path))
    results = list(continual.run(experiment, Runtime(), tmp_path))[-1]
    assert results["accuracy"] == replayed.results["accuracy"]
    assert results["recognition_per_class"] == replayed.results["recognition_per_class"]
