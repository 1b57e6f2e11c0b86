"""Damaged and foreign files, other processes, folders that are read-only or moved: whole runs lose and execute nothing.

What concerns single files, locks and stored settings stands in test_store.py.
"""

import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
from fault_harness import EXPERIMENT, snapshot

from funlora_lab import continual
from funlora_lab.__main__ import main
from funlora_lab.errors import Damaged, Stopped
from funlora_lab.store import Run, locked
from funlora_lab.training import Runtime


def events_of(home, experiment=EXPERIMENT):
    """Run the experiment, or the rest of it -> its events."""
    events = []
    continual.run(experiment, events.append, home=home)
    return events


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("finished")
    continual.run(EXPERIMENT, home=home)
    return home


@pytest.fixture
def home(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "home")


class Malicious:
    """Unpickling it leaves a file behind."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def exchange(path):
    """Another artefact's file, whose own checksum is right."""
    other = next(p for p in sorted(path.parents[1].glob("*/*.safetensors")) if p.parent != path.parent)
    path.write_bytes(other.read_bytes())


def poison(path):
    path.write_bytes(pickle.dumps(Malicious(path.parents[3] / "executed")) + b"\n")


def break_off(path):
    path.write_bytes(b'{"a":\n')


KINDS = ("network", "adapter", "samples", "classifier")
DAMAGES = [*zip(KINDS, (cut, flip, empty, exchange), strict=True), *((kind, poison) for kind in KINDS)]


@pytest.mark.parametrize(("kind", "damage"), DAMAGES)
def test_a_damaged_artefact_is_named_never_loaded_and_made_again_on_request_only(home, finished, kind, damage):
    run = Run.of(EXPERIMENT, home)
    run.results_file.unlink()  # the next run loads every artefact
    path = min(home.glob(f"artefacts/{kind}-*/*.safetensors"))
    damage(path)
    content = path.read_bytes()
    with pytest.raises(Damaged) as caught:
        continual.run(EXPERIMENT, home=home)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    assert "--repair" in str(caught.value)
    assert path.read_bytes() == content
    assert [reason.path for reason in run.repair()] == [path]
    continual.run(EXPERIMENT, home=home)
    assert snapshot(home) == snapshot(finished)
    assert not (home.parent / "executed").exists()


@pytest.mark.parametrize("damage", [break_off, poison])
@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.jsonl"])
def test_a_damaged_file_of_a_run_is_refused_unread_and_made_again_on_request(home, finished, name, damage):
    run = Run.of(EXPERIMENT, home)
    damage(run.folder / name)
    with pytest.raises(Damaged, match=name):
        continual.run(EXPERIMENT, home=home)
    assert run.folder / name in [reason.path for reason in run.repair()]
    continual.run(EXPERIMENT, home=home)
    assert snapshot(home) == snapshot(finished)
    assert not (home.parent / "executed").exists()


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", "/proc/funlora")
    assert main(["run", "smoke"]) == 2
    assert capsys.readouterr().err.startswith("funlora: Cannot make /proc/funlora")


def test_a_read_only_folder_still_shows_a_finished_run(home):
    """Nothing is locked, opened for writing or made to read a run that is complete."""
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    assert all(event["replayed"] for event in events_of(home))
    opened = continual.open_run(EXPERIMENT, "cpu", home=home)
    assert opened.samples(9).shape[0] == EXPERIMENT.samples_per_class
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_a_finished_run_moved_elsewhere_says_where_it_is_now(home, tmp_path):
    moved = tmp_path / "another" / "machine"
    moved.parent.mkdir()
    shutil.move(home, moved)
    assert str(home) not in "".join(path.read_text() for path in moved.rglob("*.json*"))
    assert events_of(moved)[-1]["run"] == str(Run.of(EXPERIMENT, moved).folder)


def test_a_run_waits_for_who_holds_it_and_may_give_up(home):
    run, told, held, leave = Run.of(EXPERIMENT, home), [], threading.Event(), threading.Event()
    run.results_file.unlink()

    def hold():
        with locked(run.folder):
            held.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        runtime = Runtime(tell=told.append, stop=lambda: "Enough waiting." if told else None)
        with pytest.raises(Stopped, match="Enough waiting"):
            continual.run(EXPERIMENT, runtime=runtime, home=home)
    finally:
        leave.set()
        holder.join()
    assert len(told) == 1
    assert f"process {os.getpid()} on " in told[0]
    assert str(run.folder) in told[0]
    assert events_of(home)[-1]["event"] == "result"


def test_two_runs_that_need_the_same_base_train_it_once(tmp_path):
    """They differ in their sampling only, so they share the base and the adapters, and start at the same time."""
    logs = {}

    def work(steps):
        logs[steps] = events_of(tmp_path, EXPERIMENT.but(steps=steps))

    threads = [threading.Thread(target=work, args=[steps]) for steps in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stage in ("base", "adapter"):
        found = [event for log in logs.values() for event in log if event.get("stage") == stage]
        assert 2 * len([event for event in found if "replayed" in event]) == len(found) > 0
