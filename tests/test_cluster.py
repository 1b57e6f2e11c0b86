"""A run's stages made apart from one another, or as tasks of Ray on two nodes, are the run of one machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from funlora_lab import LabError, cluster, commands, continual, open_run, preset
from funlora_lab.__main__ import main
from funlora_lab.continual import stages
from funlora_lab.data import load
from funlora_lab.errors import Missing, Stopped
from funlora_lab.store import Run, listing, read_lines, read_tensors
from funlora_lab.studies import sweeps, tables
from funlora_lab.training import Runtime
from funlora_lab.workbench import runs

SMOKE = preset("smoke")
TINY = SMOKE.but(
    multipliers=(1,), window="4-7", base_images=64, adapter_images=32, samples_per_class=4, chunk=4, classifier_epochs=1
)
KEPT = ("LA", "AIA", "PPC", "recognition", "flow_loss", "accuracy", "confusion")


def make_all(e, home, folder):
    """Make every missing stage in a folder of its own, as tasks on as many nodes would -> the stages made."""
    desk, runtime, made = cluster.Desk(home), Runtime(dataset=load(e)), []
    for stage in stages.plan(*continual.prepare(e, runtime, home, read_only=True)):
        try:
            stages.make(stage, e, runtime, home, read_only=True)
        except Missing:
            files = cluster.NodeStore(folder / str(len(made)), desk.give)
            stages.make(stage, e, replace(runtime, store=files), files.folder)
            cluster.keep(home, files.new())
            stages.make(stage, e, runtime, home, read_only=True)
            made.append(stage)
    return made


def equal(e, home, other, numbers):
    mine, theirs = numbers(home), numbers(other)
    assert mine == theirs
    mine, theirs = (Run.of(e, folder).results() for folder in (home, other))
    assert {name: mine[name] for name in KEPT} == {name: theirs[name] for name in KEPT}


def test_stages_made_in_folders_of_their_own_are_the_run_of_one_machine(smoke_home, tmp_path, numbers):
    made = make_all(SMOKE, tmp_path / "home", tmp_path)
    assert [stage.kind for stage in made].count("adapters") == 2
    assert [stage.kind for stage in made].count("samples") == 10
    assert len(made) == len(set(made)) == 1 + 1 + 2 + 10 + 3 + 1
    equal(SMOKE, tmp_path / "home", smoke_home, numbers)
    assert make_all(SMOKE, tmp_path / "home", tmp_path) == []


@pytest.mark.parametrize(
    "method",
    [
        "self-replay",
        "classifier-multitask",
        *(pytest.param(m, marks=pytest.mark.heavy) for m in ("jdcl", "generative-multitask")),
    ],
)
def test_so_are_those_of_a_system_that_learns_task_after_task(method, tmp_path, numbers):
    e = TINY.but(method=method, split="8-2")
    continual.run(e, home=tmp_path / "one")
    make_all(e, tmp_path / "home", tmp_path)
    equal(e, tmp_path / "home", tmp_path / "one", numbers)


def test_a_run_that_needs_more_samples_of_a_class_has_the_rest_drawn(tmp_path, numbers):
    e = TINY.but(samples_per_class=7, score_after="none", split="9-1")
    make_all(e, tmp_path / "home", tmp_path / "some")
    more = e.but(samples_per_class=11)
    made = make_all(more, tmp_path / "home", tmp_path / "more")
    assert [stage.kind for stage in made] == ["samples"] * 10 + ["result"]
    chunks = [path.name for path in (tmp_path / "home").glob("artefacts/samples-*/chunk-*")]
    assert sorted(chunks) == sorted(f"chunk-0000{i}.safetensors" for i in (0, 1, 2) * 10)
    continual.run(more, home=tmp_path / "one")
    assert numbers(tmp_path / "home") == numbers(tmp_path / "one")


def test_what_a_dead_try_left_in_its_folder_is_gone_on_with_until_it_is_finished_elsewhere(smoke_home, tmp_path):
    name = next(path.name for path in smoke_home.glob("artefacts/network-*"))
    home, folder, state = tmp_path / "home", f"artefacts/{name}", f"artefacts/{name}/state.safetensors"
    inputs = json.loads((smoke_home / folder / "inputs.json").read_text())

    def named():
        store = cluster.NodeStore(tmp_path / "node", cluster.Desk(home).give)
        return store, store.artefact(inputs["kind"], **{key: inputs[key] for key in inputs if key != "kind"})

    cluster.keep(home, {state: b"of one machine"})
    store, artefact = named()
    assert (artefact.name, artefact.state_file.read_bytes()) == (name, b"of one machine")
    assert store.new() == {}
    cluster.keep(tmp_path / "node", {state: b"later"})
    store, artefact = named()
    assert artefact.state_file.read_bytes() == b"later"
    assert store.new() == {state: b"later"}
    cluster.keep(home, cluster.Desk(smoke_home).give(folder))
    store, artefact = named()
    assert artefact.done
    assert artefact.state_file.read_bytes() == b"of one machine"
    assert store.new() == {}


class AtOnce(types.SimpleNamespace):
    """What is used of Ray, done at once in this process; a reference is a function that gives the value."""

    exceptions = types.SimpleNamespace(RayError=OSError)
    util = types.SimpleNamespace(get_node_ip_address=lambda: "192.0.2.1")

    def cluster_resources(self):
        return {"CPU": 2.0}

    def get_runtime_context(self):
        return types.SimpleNamespace(get_node_id=lambda: "here")

    def put(self, value):
        return lambda: value

    def get(self, reference):
        return reference()

    def wait(self, references, timeout):
        return references[:1], references[1:]

    def cancel(self, reference):
        pass

    def remote(self, **resources):
        return self.task

    def task(self, function):
        def call(*given):
            result = function(*[self.get(one) if type(one) is types.FunctionType else one for one in given])
            return lambda: result

        def actor(*given):
            made = function(*given)
            return AtOnce(**{name: self.task(getattr(made, name)) for name in ("give", "hear", "heard")})

        return AtOnce(remote=actor if isinstance(function, type) else call)


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", AtOnce())
    return sys.modules["ray"]


def test_a_run_that_a_cluster_makes_counts_as_running_and_its_log_says_how_far_it_is(at_once, tmp_path, numbers):
    seen, stop = [], [False]

    def report(event):
        with ThreadPoolExecutor(1) as other:  # a thread that holds nothing
            (line,) = other.submit(listing, tmp_path).result()
        seen.append((line["state"], *runs.progress(Run.at(line["folder"]))))
        if stop[0]:
            raise Stopped("Enough.")

    def drive():
        cluster.Driver(at_once, [TINY], "cpu", tmp_path, Runtime(report=report)).drive()

    stop[0] = True
    with pytest.raises(Stopped):
        drive()
    assert seen[0][0] == "running"
    assert listing(tmp_path)[0]["state"] == "unfinished", "nobody works on it"
    stop[0] = False
    drive()
    states, shares, sentences = zip(*seen[1:], strict=True)
    assert set(states[:-1]) == {"running"}
    assert list(shares) == sorted(shares)
    assert 0 < shares[0] < shares[-1] == 1
    assert all("A Ray cluster is at work on it." in sentence for sentence in sentences[:-1])
    assert any(re.search(r"About \d+ s remain\.", sentence) for sentence in sentences)
    assert states[-1] == "finished"
    assert {event["event"] for event in Run.of(TINY, tmp_path).events()} >= {"run", "loss", "accuracy", "result"}
    continual.run(TINY, home=tmp_path / "one")
    equal(TINY, tmp_path, tmp_path / "one", numbers)


@pytest.mark.parametrize("word", ["3", "0", "two"])
def test_a_base_is_not_given_more_workers_than_the_cluster_has(at_once, tmp_path, monkeypatch, word):
    monkeypatch.setenv("FUNLORA_BASE_WORKERS", word)
    with pytest.raises(LabError, match=f"base-workers={word}: accepted by this cluster is a whole number from 1 to 2"):
        cluster.Driver(at_once, [TINY], "cpu", tmp_path, Runtime())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster of two nodes of one CPU each."""
    ray = pytest.importorskip("ray", reason="the extra cluster is not installed: pip install -e '.[cluster]'")
    from ray.cluster_utils import Cluster

    # Ray's workers give way to all other processes unless they are told not to
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.connect()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def on(nodes, monkeypatch):
    """on(experiments, home, report): do what is missing on the two nodes."""
    monkeypatch.setenv("FUNLORA_RAY", nodes.address)
    return lambda todo, home, report=print, **how: cluster.do(todo, "cpu", home, Runtime(report=report), **how)


@pytest.mark.heavy
def test_two_nodes_make_the_run_of_one_process_and_each_artefact_once(on, smoke_home, tmp_path, numbers):
    events = []
    on([SMOKE], tmp_path, events.append)
    equal(SMOKE, tmp_path, smoke_home, numbers)
    assert events[-1]["share"] == 1
    assert events[-1]["done"] == 18
    assert any(0 < event["share"] < 1 and event["running"] > 1 for event in events)
    for log in (tmp_path / "artefacts").glob("*/log.jsonl"):
        steps = [(event.get("class"), event["step"]) for event in read_lines(log)]
        assert len(steps) == len(set(steps)), f"{log} was written twice"


@pytest.mark.heavy
def test_a_node_that_dies_costs_its_task_alone(nodes, on, smoke_home, tmp_path, numbers):
    killed = []

    def kill(event):
        if event["running"] > 1 and not killed:  # one task on each node
            killed.append(next(iter(nodes.worker_nodes)))
            nodes.remove_node(killed[0], allow_graceful=False)

    on([SMOKE], tmp_path, kill)
    nodes.add_node(num_cpus=1)  # for the tests that follow
    assert killed
    equal(SMOKE, tmp_path, smoke_home, numbers)


def finished(home):
    return {path: path.stat().st_mtime_ns for path in home.glob("artefacts/*/[rc]*.safetensors")}


@pytest.mark.heavy
def test_a_driver_that_is_killed_and_started_again_computes_only_what_was_missing(
    nodes, on, smoke_home, tmp_path, numbers
):
    words = [sys.executable, "-m", "funlora_lab", "run", "smoke", "--device", "cpu", "--json", "--ray", nodes.address]
    driver = subprocess.Popen(words, env=os.environ | {"FUNLORA_HOME": str(tmp_path)}, stdout=subprocess.DEVNULL)
    while len(finished(tmp_path)) < 4:
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    before, events = finished(tmp_path), []
    assert not Run.of(SMOKE, tmp_path).results()
    on([SMOKE], tmp_path, events.append)
    assert before.items() <= finished(tmp_path).items()
    assert events[-1]["done"] < 18
    equal(SMOKE, tmp_path, smoke_home, numbers)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("register", "reason"),
    [
        (partial(commands.execute, "/nosuch/method.py"), r"failed on .+ \(.+\): /nosuch/method\.py: FileNotFoundError"),
        (partial(os._exit, 1), r"failed in 3 tries, last on .+ \(.+\): WorkerCrashedError"),
        (
            lambda: os.environ.get("RANK") == "1" and os._exit(1),
            r"failed in 1 tries, last on .+ \(.+\): WorkerHealthCheckFailedError: A worker health check failed",
        ),
    ],
)
def test_a_task_that_fails_ends_in_a_sentence_with_its_stage_and_node(on, tmp_path, monkeypatch, register, reason):
    if not isinstance(register, partial):  # the second process of a base dies
        monkeypatch.setenv("FUNLORA_BASE_WORKERS", "2")
        monkeypatch.setattr(cluster, "TRIES", 1)
    with pytest.raises(LabError, match=rf"^The (classifier|network) of \d+ classes of smoke-\S+-seed0-\w+ {reason}"):
        on([TINY], tmp_path, register=register)


@pytest.mark.heavy
def test_a_node_needs_no_images(on, tmp_path):
    pictures = tmp_path / "pictures"
    for part, n in (("train", 8), ("test", 2)):
        for cls in range(4):
            (pictures / part / str(cls)).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng([cls, i]).integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(pictures / part / str(cls) / f"{i}.png")
    e = TINY.but(data="folder", data_root=str(pictures), split="2-1", score_after="last")
    gone = partial(shutil.rmtree, pictures, ignore_errors=True)  # in every task, as on a node that never had them
    on([e], tmp_path / "home", register=gone)
    assert Run.of(e, tmp_path / "home").results()
    assert not pictures.exists()


@pytest.mark.heavy
def test_two_workers_of_ray_train_make_the_base_of_torchrun_whatever_dies(nodes, on, tmp_path, monkeypatch, numbers):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "funlora_lab"]
    words += ["run", "smoke", "--device", "cpu", "--json", "--ray", nodes.address]
    words += [f"--set={word}" for word in ("multipliers=1", "window=4-7", "adapter_images=32", "samples_per_class=4")]
    home, killed = tmp_path / "torchrun", []
    done = subprocess.run(words, env=os.environ | {"FUNLORA_HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"]
    base = next(home.glob("artefacts/network-*"))
    assert read_tensors(base / "result.safetensors")[1]["processes"] == 2
    assert [path.parent for path in home.glob("artefacts/*/.lock")] == [base]  # no other was made in this home

    def kill(event):
        if event["done"] and event["running"] and not killed:  # the judge is made, the base is not
            killed.append(next(iter(nodes.worker_nodes)))
            nodes.remove_node(killed[0], allow_graceful=False)
            nodes.add_node(num_cpus=1)

    monkeypatch.setenv("FUNLORA_BASE_WORKERS", "2")
    e = SMOKE.but(multipliers=(1,), window="4-7", adapter_images=32, samples_per_class=4)
    on([e], tmp_path, kill)
    assert killed
    equal(e, tmp_path, home, numbers)
    assert read_tensors(tmp_path / "artefacts" / base.name / "result.safetensors")[1]["processes"] == 2


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere", r"ray=nowhere: no cluster answers there \(.*\); accepted is local, or the HOST:PORT of a head"),
        ("ray://head:10001", r"ray=ray://head:10001: no cluster answers there"),
        ("127.0.0.1:9", r"ray=127.0.0.1:9: no cluster answers there \(.*refused\)"),
    ],
)
def test_a_bad_address_is_refused_at_once(address, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=bool))
    assert main(["run", "smoke", "--device", "cpu", "--ray", address]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "home").glob("*/config.json"))


def test_workers_for_a_base_are_a_clusters(capsys):
    assert main(["run", "smoke", "--base-workers", "2"]) == 2
    assert "--base-workers: accepted with --ray; without it, torchrun" in capsys.readouterr().err


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["sweep", "smoke", "--tables", "ratios", "--seeds", "1", "--ray"]) == 2
    assert "--ray needs Ray, which is not installed: pip install 'funlora-lab[cluster]'" in capsys.readouterr().err


def test_a_plan_says_how_long_the_papers_tables_take_and_what_bounds_them(capsys):
    words = ["sweep", "imagenet100", "--tables", "methods", "--seeds", "1", "--plan", "--gpus"]
    assert main([*words, "64"]) == 0
    said = capsys.readouterr().out
    found = re.findall(r"(\d+) GPUs? +([\d.]+) (days|h)(?: to ([\d.]+) (days|h))?\n", said)
    hours = {"days": 24, "h": 1, "": 0}
    low = [float(least) * hours[unit] for _, least, unit, *_ in found]
    high = [float(most or 0) * hours[unit] for *_, most, unit in found]
    assert [n for n, *_ in found] == ["1", "8", "64"]
    assert low == sorted(low, reverse=True)
    assert low[1] == pytest.approx(max(low[0] / 8, low[2]), rel=0.02)
    assert all(least < most for least, most in zip(low[1:], high[1:], strict=True))
    assert re.search(r"The longest chain of stages takes [\d.]+ \w+: generative-multitask, seed 0 \(network ", said)
    assert "64 GPUs are bound by that chain" in said
    paper = sweeps.on_gpus([preset("imagenet100").but(score_after="every")], 1)
    assert re.search(r"1 GPU +2\.1 days\n", paper)  # 49.4 hours
    assert main(["sweep", "digits", "--gpus", "8"]) == 2
    assert "gpus=8: accepted for cifar10 and imagenet100" in capsys.readouterr().err


@pytest.mark.heavy
def test_notebooks_do_their_runs_on_the_cluster_that_the_environment_names(on, tmp_path):
    events, said = [], []
    wanted = [tables.Cell("some", method, TINY.but(method=method)) for method in ("funlora", "shift")]
    sweeps.perform(wanted, "cpu", tmp_path, show=said.append, report=events.append)
    assert re.fullmatch(r"done in \d+ s", said[-1])
    assert events[-1]["share"] == 1
    assert len(list(tmp_path.glob("artefacts/network-*"))) == 1  # both runs wait for one base
    assert open_run(TINY, "cpu", home=tmp_path).results == wanted[0].run(tmp_path).results()
