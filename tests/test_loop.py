"""The continual loop: nothing learned is ever changed, classes are independent of each other, every method runs."""

import json
import shutil

import pytest
import torch

from funlora_lab import continual
from funlora_lab.config import METHODS
from funlora_lab.frozen import FrozenBase
from funlora_lab.opened import exhaust, open_run
from funlora_lab.presets import preset
from funlora_lab.store import Store
from funlora_lab.training import Runtime
from funlora_lab.work import Work

SMOKE = preset("smoke")


@pytest.fixture(scope="module")
def own_home(smoke_home, tmp_path_factory):
    """A copy of the finished smoke run's home, to train other methods in."""
    return shutil.copytree(smoke_home, tmp_path_factory.mktemp("own") / "home")


def test_learning_more_tasks_leaves_backbone_adapters_and_samples_bit_for_bit_unchanged(smoke_run):
    learner = FrozenBase(smoke_run.work)
    exhaust(learner.learn(0))
    exhaust(learner.learn(1))
    backbone = {name: value.clone() for name, value in learner.net.state_dict().items()}
    rows = {cls: {name: value.clone() for name, value in row.items()} for cls, row in learner.rows.items()}
    samples = smoke_run.samples_after(2)
    exhaust(learner.learn(2))
    assert all(torch.equal(value, backbone[name]) for name, value in learner.net.state_dict().items())
    assert rows.keys() == {6, 7}
    assert all(torch.equal(learner.rows[cls][name], value) for cls, row in rows.items() for name, value in row.items())
    later = smoke_run.samples_after(3)
    assert later.keys() > samples.keys()
    assert all(torch.equal(later[cls], images) for cls, images in samples.items())


def test_a_class_learns_the_same_alone_as_beside_others(smoke_run, tmp_path):
    rows = []
    for lanes in (0, 1):
        experiment = SMOKE.but(lanes=lanes)
        learner = FrozenBase(Work(experiment, smoke_run.work.dataset, smoke_run.tasks, Store(tmp_path), Runtime()))
        exhaust(learner.learn(0))
        exhaust(learner.learn_side_by_side([6, 7]) if lanes == 0 else learner.learn_side_by_side([6]))
        rows.append(learner.rows[6])
        shutil.rmtree(learner.stage(6).folder)
    assert all(torch.allclose(value, rows[1][name], atol=1e-4) for name, value in rows[0].items())


def test_samples_are_nested(smoke_run):
    assert torch.equal(smoke_run.samples(7, 45)[:20], smoke_run.samples(7, 20))


def test_results_follow_from_the_logged_accuracies(smoke_run):
    matrix = smoke_run.results["accuracy"]
    assert [len(row) for row in matrix] == [1, 2, 3]
    averages = [sum(row) / len(row) for row in matrix]
    assert smoke_run.results["LA"] == pytest.approx(averages[-1])
    assert smoke_run.results["AIA"] == pytest.approx(sum(averages) / 3)
    assert sum(map(sum, smoke_run.results["confusion"])) == 360


def test_a_second_run_reads_the_first(smoke_home):
    events = list(continual.run(SMOKE, home=smoke_home))
    assert all(event["replayed"] for event in events)
    assert events[-1]["event"] == "result"


def test_every_method_runs_to_its_result_over_the_same_base(own_home):
    networks = set(own_home.glob("artefacts/network-*"))
    for method in METHODS:
        opened = open_run(SMOKE.but(method=method), "cpu", home=own_home)
        assert 0 <= opened.results["LA"] <= 1, method
        stored = json.loads(opened.run.results_file.read_text())
        assert stored | {"run": str(opened.run.folder)} == opened.results  # where it lies is never stored
        if isinstance(opened.learner, FrozenBase):
            assert set(own_home.glob("artefacts/network-*")) >= networks
            assert opened.learner.key == next(iter(networks)).name.removeprefix("network-"), method


def test_operations_run_through_the_loop(own_home):
    sizes = {
        operation: open_run(SMOKE.but(operation=operation), "cpu", home=own_home).results["PPC"]
        for operation in ("mul", "add", "mul-add")
    }
    assert sizes["mul-add"] == 2 * sizes["mul"] == 2 * sizes["add"]


def test_fine_tuning_changes_the_samples_of_old_classes(own_home):
    opened = open_run(SMOKE.but(method="fine-tune"), "cpu", home=own_home)
    assert not torch.equal(opened.samples_after(1)[0], opened.samples_after(3)[0])
