"""Full disks, foreign files, other processes, other versions: one sentence, and nothing is lost or executed."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from fault_harness import EXPERIMENT, snapshot

from funlora_lab import continual
from funlora_lab.__main__ import main
from funlora_lab.disk import append_line, locked, read_json, read_tensors, safe_name, write_atomically, write_tensors
from funlora_lab.errors import Damaged, LabError, Stopped
from funlora_lab.opened import OpenRun
from funlora_lab.store import FORMAT, Run
from funlora_lab.training import Runtime


def exhaust(events):
    return list(events)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("finished")
    exhaust(continual.run(EXPERIMENT, home=home))
    return home


@pytest.fixture
def home(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "home")


@pytest.fixture
def unfinished(home):
    """All artefacts are there, the run's own results are not: the next run loads every artefact."""
    Run.of(EXPERIMENT, home).results_file.unlink()
    return home


def artefacts(home):
    """One tensor file of every kind of artefact."""
    found = {}
    for path in sorted(home.glob("artefacts/*/*.safetensors")):
        found.setdefault(path.parent.name.partition("-")[0], path)
    return found


class Malicious:
    """Unpickling it leaves a file behind."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


KINDS = ("network", "adapter", "samples", "classifier")


@pytest.mark.parametrize("kind", KINDS)
def test_a_malicious_pickle_in_place_of_an_artefact_is_refused_unread(unfinished, tmp_path, kind):
    proof = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malicious(proof)))
    assert proof.exists()  # the payload works...
    proof.rmdir()
    path = artefacts(unfinished)[kind]
    path.write_bytes(pickle.dumps(Malicious(proof)))
    with pytest.raises(Damaged, match=path.parent.name):
        exhaust(continual.run(EXPERIMENT, home=unfinished))
    assert not proof.exists()  # ...and is never executed


@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.jsonl"])
def test_a_malicious_pickle_in_place_of_a_run_s_file_is_refused_unread(home, tmp_path, name):
    proof = tmp_path / "executed"
    path = Run.of(EXPERIMENT, home).folder / name
    path.write_bytes(pickle.dumps(Malicious(proof)) + b"\n")
    with pytest.raises(Damaged, match=name):
        exhaust(continual.run(EXPERIMENT, home=home))
    assert not proof.exists()


def test_pytorch_s_own_pickles_are_refused_too(unfinished):
    path = artefacts(unfinished)["network"]
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(Damaged, match="not a safetensors file"):
        exhaust(continual.run(EXPERIMENT, home=unfinished))


def truncate(path):
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


DAMAGES = (truncate, flip, empty, exchange)


@pytest.mark.parametrize(
    ("kind", "damage"), [*zip(KINDS, DAMAGES, strict=True), *zip(KINDS, DAMAGES[2:] + DAMAGES[:2], strict=True)]
)
def test_a_damaged_artefact_is_named_never_loaded_and_made_again_on_request_only(finished, tmp_path, kind, damage):
    home = shutil.copytree(finished, tmp_path / "home")
    run = Run.of(EXPERIMENT, home)
    run.results_file.unlink()
    path = artefacts(home)[kind]
    damage(path)
    content = path.read_bytes()
    with pytest.raises(Damaged) as caught:
        exhaust(continual.run(EXPERIMENT, home=home))
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    assert "--repair" in str(caught.value)
    assert path.read_bytes() == content
    assert [reason.path for reason in run.repair()] == [path]
    exhaust(continual.run(EXPERIMENT, home=home))
    assert snapshot(home) == snapshot(finished)


@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.jsonl"])
def test_a_damaged_file_of_a_run_is_made_again_on_request(home, finished, name):
    run = Run.of(EXPERIMENT, home)
    (run.folder / name).write_bytes(b'{"a":\n')
    with pytest.raises(Damaged, match=name):
        exhaust(continual.run(EXPERIMENT, home=home))
    assert run.folder / name in [reason.path for reason in run.repair()]
    exhaust(continual.run(EXPERIMENT, home=home))
    assert snapshot(home) == snapshot(finished)


def test_a_really_full_disk_is_reported_in_one_sentence(tmp_path):
    """/dev/full takes every byte and then says that no space is left."""
    log = tmp_path / "log.jsonl"
    log.symlink_to("/dev/full")
    with pytest.raises(LabError, match=r"Cannot write .*log.jsonl: No space left on device"):
        append_line(log, {"event": "loss"})


def test_a_write_cut_short_leaves_the_old_file(tmp_path):
    """The system refuses to let files of this process grow beyond a few bytes."""
    program = """
import resource, signal, sys, torch
from pathlib import Path
from funlora_lab.disk import write_tensors
from funlora_lab.errors import LabError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_tensors(Path(sys.argv[1]), {"a": torch.ones(1000)})
except LabError as reason:
    print(reason)
"""
    path = tmp_path / "result.safetensors"
    write_tensors(path, {"a": torch.zeros(3)})
    printed = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True).stdout
    assert printed == f"Cannot write {path}: File too large; what was saved before is untouched.\n"
    assert read_tensors(path)[0]["a"].tolist() == [0, 0, 0]
    assert os.listdir(tmp_path) == [path.name]


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", "/proc/funlora")
    assert main(["run", "smoke"]) == 2
    assert capsys.readouterr().err.startswith("funlora: Cannot make /proc/funlora")


def test_a_read_only_folder_still_shows_a_finished_run(home, monkeypatch):
    """Nothing is locked, opened for writing or made to read a run that is complete."""
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    events = exhaust(continual.run(EXPERIMENT, home=home))
    assert all(event["replayed"] for event in events)
    opened = OpenRun(Run.of(EXPERIMENT, home), Runtime())
    assert opened.samples(9).shape[0] == EXPERIMENT.samples_per_class
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_a_finished_run_moved_elsewhere_says_where_it_is_now(home, tmp_path):
    moved = tmp_path / "another" / "machine"
    moved.parent.mkdir()
    shutil.move(home, moved)
    assert str(home) not in "".join(path.read_text() for path in moved.rglob("*.json*"))
    events = exhaust(continual.run(EXPERIMENT, home=moved))
    assert events[-1]["run"] == str(Run.of(EXPERIMENT, moved).folder)


def test_a_folder_with_another_configuration_is_refused_with_the_difference(home):
    run = Run.of(EXPERIMENT, home)
    config = read_json(run.config_file)
    config["experiment"]["adapter_batch"] = 99
    del config["experiment"]["solver"]
    run.config_file.write_text(json.dumps(config))
    with pytest.raises(LabError, match="adapter_batch is 99 there and 16 here; solver is midpoint there"):
        exhaust(continual.run(EXPERIMENT, home=home))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(format=FORMAT + 1), f"its format is {FORMAT + 1} and this program's {FORMAT}"),
        (lambda c: c["provenance"]["versions"].update({"funlora-lab": "9.9"}), "begun by funlora-lab 9.9"),
    ],
)
def test_an_unfinished_run_of_another_version_is_refused(unfinished, change, sentence):
    run = Run.of(EXPERIMENT, unfinished)
    config = read_json(run.config_file)
    change(config)
    run.config_file.write_text(json.dumps(config))
    with pytest.raises(LabError, match=sentence):
        exhaust(continual.run(EXPERIMENT, home=unfinished))


HOLDER = """
import sys, time
from pathlib import Path
from funlora_lab.disk import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder_of(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_who_waits_is_told_who_holds_the_run_and_may_give_up_and_a_kill_frees_it(unfinished):
    folder = Run.of(EXPERIMENT, unfinished).folder
    process, told = holder_of(folder), []
    runtime = Runtime(tell=told.append, stop=lambda: "Enough waiting." if told else None)
    with pytest.raises(Stopped, match="Enough waiting"):
        exhaust(continual.run(EXPERIMENT, runtime, unfinished))
    assert len(told) == 1
    assert f"process {process.pid} on " in told[0]
    assert str(folder) in told[0]
    process.kill()
    process.wait()
    assert exhaust(continual.run(EXPERIMENT, home=unfinished))[-1]["event"] == "result"


def test_two_runs_that_need_the_same_base_train_it_once(tmp_path):
    """They differ in their sampling only, so they share the base and the adapters, and start at the same time."""
    logs, threads = {}, []
    for steps in (1, 2):
        experiment = EXPERIMENT.but(steps=steps)
        work = lambda e=experiment: logs.setdefault(e.steps, exhaust(continual.run(e, home=tmp_path)))  # noqa: E731
        threads.append(threading.Thread(target=work))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stage in ("base", "adapter"):
        fresh = [e for log in logs.values() for e in log if e.get("stage") == stage and "replayed" not in e]
        replayed = [e for log in logs.values() for e in log if e.get("stage") == stage and "replayed" in e]
        assert len(fresh) == len(replayed) > 0


def test_the_same_thread_may_hold_a_folder_twice(tmp_path):
    with locked(tmp_path), locked(tmp_path):
        pass


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b\\c", "~root", "x" * 500, "\0"])
def test_a_name_never_leaves_its_folder(tmp_path, name):
    safe = safe_name(name)
    path = (tmp_path / safe).resolve()
    assert path.parent == tmp_path.resolve()
    write_atomically(path, b"content")
    assert safe_name("Größe 3") == "Größe_3"


def test_nothing_in_the_package_unpickles():
    import funlora_lab

    code = re.compile(
        r"import pickle|joblib|allow_pickle=True|(?<![.\w])(eval|exec)\(|torch\.load\((?!.*weights_only=True)"
    )
    for path in Path(funlora_lab.__file__).parent.glob("*.py"):
        assert not code.search(path.read_text()), path.name
