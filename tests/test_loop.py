"""The continual loop: nothing learned is ever changed, classes are independent of each other, every method runs."""

import json
import shutil

import pytest
import torch

from funlora_lab import continual, open_run, preset
from funlora_lab.store import Store, read_tensors
from funlora_lab.studies import keep
from funlora_lab.systems import AdaptedBase, Context, all_methods
from funlora_lab.systems.sampling import glimpse
from funlora_lab.training import Runtime

SMOKE = preset("smoke")
# over the base of the preset
SHORT = SMOKE.but(adapter_images=32, solver="euler", steps=1, samples_per_class=4, chunk=4, classifier_epochs=1)


@pytest.fixture(scope="module")
def own_home(smoke_home, tmp_path_factory):
    """A copy of the finished smoke run's home, to train other methods in."""
    return shutil.copytree(smoke_home, tmp_path_factory.mktemp("own") / "home")


def test_learning_more_tasks_leaves_backbone_adapters_and_samples_bit_for_bit_unchanged(smoke_run):
    generator = smoke_run.generator_after(2)
    backbone = {name: value.clone() for name, value in generator.net.state_dict().items()}
    rows = {cls: {name: value.clone() for name, value in row.items()} for cls, row in generator.rows.items()}
    samples = smoke_run.samples_after(2)
    generator.learn(2)
    assert all(torch.equal(value, backbone[name]) for name, value in generator.net.state_dict().items())
    assert rows.keys() == {6, 7}
    assert generator.rows.keys() == {6, 7, 8, 9}
    assert all(torch.equal(generator.rows[cls][name], v) for cls, row in rows.items() for name, v in row.items())
    later = smoke_run.samples_after(3)
    assert later.keys() > samples.keys()
    assert all(torch.equal(later[cls], images) for cls, images in samples.items())


def test_a_class_learns_the_same_alone_as_beside_others(smoke_run, smoke_home, tmp_path):
    for network in smoke_home.glob("artefacts/network-*"):
        shutil.copytree(network, tmp_path / "artefacts" / network.name)
    tasks = [smoke_run.tasks[0], [6]]
    generator = AdaptedBase(Context(SMOKE, smoke_run.context.dataset, tasks, Store(tmp_path), Runtime()))
    generator.learn(0)
    generator.learn(1)
    for name, value in smoke_run.row(6).items():  # learned beside class 7
        torch.testing.assert_close(generator.rows[6][name], value, rtol=0, atol=1e-4)


def test_a_training_that_is_watched_draws_from_the_same_noise_and_comes_out_the_same(smoke_home, numbers, tmp_path):
    """Bases and adapters: the last look is what the finished generator draws, and every file has the same bits."""
    looks, kept = [], keep.looks(tmp_path / "run")

    def watch(event, images):
        looks.append((event, images))
        kept(event, images)

    run = open_run(SMOKE, "cpu", home=tmp_path / "home", watch=watch)
    assert numbers(tmp_path / "home") == numbers(smoke_home)
    of = {}  # what was trained -> its looks
    for event, images in looks:
        of.setdefault((event["stage"], *event["classes"]), []).append((event["step"], images))
        assert event["loss"] > 0
    assert list(of) == [("base",), ("adapter", 6, 7), ("adapter", 8, 9)]
    for (stage, *classes), seen in of.items():
        steps, last = [step for step, _ in seen], (SMOKE.base if stage == "base" else SMOKE.adapter).steps
        assert (len(steps) >= 2, steps, steps[-1]) == (True, sorted(set(steps)), last)
        assert not torch.equal(seen[0][1], seen[-1][1])
        assert torch.equal(seen[-1][1], glimpse(run.generator, classes or run.tasks[0]))
    names = sorted(path.name for path in (tmp_path / "run/training").iterdir())
    assert (len(names), names[0]) == (len(looks), "adapter-6-0000005.png")


def test_samples_are_nested(smoke_run):
    assert torch.equal(smoke_run.samples(7, 45)[:20], smoke_run.samples(7, 20))


def test_results_follow_from_the_logged_accuracies(smoke_run):
    matrix = smoke_run.results["accuracy"]
    assert [len(row) for row in matrix] == [1, 2, 3]
    averages = [sum(row) / len(row) for row in matrix]
    assert smoke_run.averages == averages
    assert smoke_run.results["LA"] == pytest.approx(averages[-1])
    assert smoke_run.results["AIA"] == pytest.approx(sum(averages) / 3)
    assert sum(map(sum, smoke_run.results["confusion"])) == 360


def test_a_second_run_reads_the_first(smoke_home):
    events = []
    results = continual.run(SMOKE, events.append, home=smoke_home)
    assert all(event["replayed"] for event in events)
    assert events[-1] == results | {"replayed": True}


ELSEWHERE = ("dgr-diffusion", "guide", "ddgr", "jdcl", "stable-diffusion")  # run in tests of their own


@pytest.mark.parametrize("method", [method for method in all_methods() if method not in ELSEWHERE])
def test_every_method_runs_to_its_result_over_the_same_base(own_home, method):
    run = open_run(SHORT.but(method=method, score_after="last"), "cpu", home=own_home)
    assert 0 <= run.results["LA"] <= 1
    stored = json.loads(run.run.results_file.read_text())
    assert stored | {"run": str(run.run.folder)} == run.results  # where it lies is never stored
    if run.generator.frozen:
        assert run.generator.key == open_run(SMOKE, "cpu", home=own_home).generator.key


def test_operations_run_through_the_loop(own_home):
    experiments = [SHORT.but(operation=operation, score_after="last") for operation in ("mul", "add", "mul-add")]
    mul, add, both = (open_run(experiment, "cpu", home=own_home).results["PPC"] for experiment in experiments)
    assert both == 2 * mul == 2 * add


def test_fine_tuning_changes_the_samples_of_old_classes(own_home):
    run = open_run(SHORT.but(method="fine-tune"), "cpu", home=own_home)
    assert not torch.equal(run.samples_after(1)[0], run.samples_after(3)[0])


@pytest.mark.parametrize("lanes", [1, 3, 4])
def test_what_adapters_cost_is_booked_on_the_task_of_each_class(smoke_home, tmp_path, lanes):
    """With more lanes than a task has classes, adapters of later tasks are trained early; they cost what others do."""
    for network in smoke_home.glob("artefacts/network-*"):
        shutil.copytree(network, tmp_path / "artefacts" / network.name)
    run = open_run(SHORT.but(lanes=lanes), "cpu", home=tmp_path)
    sizes = sorted(read_tensors(path)[1]["side_by_side"] for path in tmp_path.glob("artefacts/adapter-*/result.*"))
    assert sizes == {1: [1, 1, 1, 1], 3: [1, 3, 3, 3], 4: [4, 4, 4, 4]}[lanes]
    costs = run.costs
    assert costs["new classes"].tolist() == [6, 2, 2]
    assert costs["images"].tolist() == [640, 2 * 32, 2 * 32]
    seconds = {cls: run.generator.artefact_of(cls).result()[1]["seconds"] for cls in run.generator.rows}
    assert costs["train"].tolist()[1:] == pytest.approx([seconds[6] + seconds[7], seconds[8] + seconds[9]], abs=2e-3)
    assert costs["train"].min() > 0
    groups = [read_tensors(path)[1]["seconds"] for path in tmp_path.glob("artefacts/adapters-*/result.*")]
    assert sum(groups) == pytest.approx(sum(seconds.values()))
    total = costs[["train", "sample", "classify"]].to_numpy().sum()
    assert total == pytest.approx(run.results["seconds"], abs=0.01)
