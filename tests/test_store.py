"""Files, artefacts and stored runs: whole or refused, held by one at a time, listed whatever has happened to them."""

import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from funlora_lab import __version__, store
from funlora_lab.errors import Damaged, LabError, Stopped
from funlora_lab.presets import preset
from funlora_lab.store import Run, Store, locked

FORK = multiprocessing.get_context("fork")
SMOKE = preset("smoke")
RESULTS = {"event": "result", "LA": 0.5, "AIA": 0.5}
FREE = (lambda: None, lambda sentence: None)  # a check that never stops and nobody who is told


def started(function, *words):
    """A process that calls the function."""
    process = FORK.Process(target=function, args=words)
    process.start()
    return process


@pytest.fixture
def run(tmp_path):
    """A run that has been begun."""
    run = Run.of(SMOKE, tmp_path / "home")
    with locked(run.folder):
        run.open({"started": "2026-01-01T00:00:00", "versions": {"funlora-lab": __version__}})
    return run


def rewrite(run, change):
    """Change what config.json holds."""
    config = store.read_json(run.config_file)
    change(config)
    store.write_json(run.config_file, config)


def test_a_really_full_disk_is_reported_in_one_sentence(tmp_path):
    """/dev/full takes every byte and then says that no space is left."""
    log = tmp_path / "log.jsonl"
    log.symlink_to("/dev/full")
    with pytest.raises(LabError, match=r"Cannot write .*log.jsonl: No space left on device"):
        store.append_line(log, {"event": "loss"})


def test_a_write_cut_short_leaves_the_old_file(tmp_path):
    """The system refuses to let files of the writing process grow beyond a few bytes."""
    path, said = tmp_path / "result.safetensors", FORK.SimpleQueue()
    store.write_tensors(path, {"a": torch.zeros(3)})

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            store.write_tensors(path, {"a": torch.ones(1000)})
        except LabError as reason:
            said.put(str(reason))

    started(write).join()
    assert said.get() == f"Cannot write {path}: File too large; what was saved before is untouched."
    assert store.read_tensors(path)[0]["a"].tolist() == [0, 0, 0]
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b\\c", "~root", "x" * 500, "\0"])
def test_a_name_never_leaves_its_folder(tmp_path, name):
    path = (tmp_path / store.safe_name(name)).resolve()
    assert path.parent == tmp_path.resolve()
    store.write_atomically(path, b"content")
    assert store.safe_name("Größe 3") == "Größe_3"


class Malicious:
    """Unpickling it leaves a file behind."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("read", [store.read_json, store.read_lines, store.read_tensors])
def test_a_malicious_pickle_is_refused_unread(tmp_path, read):
    proof, path = tmp_path / "executed", tmp_path / "file"
    pickle.loads(pickle.dumps(Malicious(proof)))
    assert proof.exists()  # the payload works...
    proof.rmdir()
    path.write_bytes(pickle.dumps(Malicious(proof)) + b"\n")
    with pytest.raises(Damaged, match="file is damaged"):
        read(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(Damaged, match="file is damaged"):
        read(path)
    assert not proof.exists()  # ...and is never executed


def test_nothing_in_the_package_unpickles_or_runs_text_but_a_user_s_own_file():
    loads = r"import pickle|joblib|allow_pickle=True|torch\.load\((?!.*weights_only=True)"
    code = re.compile(loads + r"|(?<![.\w])(eval|exec)\((?!compile\(path)")
    for path in Path(store.__file__).parents[1].rglob("*.py"):
        assert not code.search(path.read_text()), path.name


def test_who_waits_is_told_who_holds_the_folder_and_may_give_up_and_a_kill_frees_it(tmp_path):
    held = FORK.Event()

    def hold():
        with locked(tmp_path):
            held.set()
            time.sleep(60)

    process = started(hold)
    assert held.wait(10)
    told = []

    def check():
        if told:
            raise Stopped("Enough waiting.")

    assert store.in_use(tmp_path)
    with pytest.raises(Stopped, match="Enough waiting"), locked(tmp_path, check, told.append):
        pass
    assert told == [f"Waiting for process {process.pid} on {os.uname().nodename}, which holds {tmp_path}."]
    with pytest.raises(LabError, match=f"in use by process {process.pid}"), locked(tmp_path, patience=0):
        pass
    process.kill()
    process.join()
    assert not store.in_use(tmp_path)
    with locked(tmp_path):
        pass


def test_the_same_thread_may_hold_a_folder_twice_and_another_thread_may_not(tmp_path):
    seen = []
    with locked(tmp_path):
        with locked(tmp_path):
            pass
        thread = threading.Thread(target=lambda: seen.append(store.in_use(tmp_path)))
        thread.start()
        thread.join()
        assert (tmp_path / ".holder").exists()
    assert seen == [True]
    assert not store.in_use(tmp_path)


def test_two_processes_that_change_one_json_file_lose_nothing(tmp_path):
    path = tmp_path / "figures" / "results.json"

    def change(name):
        for i in range(60):
            store.update_json(path, lambda known, i=i: known | {f"{name}{i}": i})

    for process in [started(change, name) for name in "ab"]:
        process.join()
        assert process.exitcode == 0
    assert store.read_json(path) == {f"{name}{i}": i for name in "ab" for i in range(60)}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut short": lambda path, other: path.write_bytes(path.read_bytes()[:-5]),
    "one bit": lambda path, other: flip(path),
    "empty": lambda path, other: path.write_bytes(b""),
    "another's, whose own checksum is right": lambda path, other: path.write_bytes(other.read_bytes()),
    "not ours": lambda path, other: torch.save({"weight": torch.zeros(2)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_artefact_is_named_never_loaded_and_deleted_on_request_only(run, damage):
    one, other = (run.store.artefact("network", seed=seed) for seed in (0, 1))
    for artefact in (one, other):
        with artefact.held(*FREE):
            artefact.log({"event": "loss"})
            artefact.save_state({"weight": torch.ones(2)}, step=1)
            artefact.finish({"weight": torch.ones(2)}, seconds=1.0)
    assert one.name.startswith("network-")
    assert not one.state_file.exists()
    assert run.store.discard_damaged() == []
    DAMAGES[damage](one.result_file, other.result_file)
    content = one.result_file.read_bytes()
    with pytest.raises(Damaged, match=f"{one.result_file}.*--repair") as caught:
        one.result()
    assert caught.value.path == one.result_file
    assert one.result_file.read_bytes() == content
    assert [reason.path for reason in run.repair()] == [one.result_file]
    assert (one.done, other.done) == (False, True)


def test_progress_is_resumed_with_the_log_of_that_moment(tmp_path):
    artefact = Store(tmp_path).artefact("adapter", cls=3)
    assert artefact.resume() is None
    with artefact.held(*FREE):
        artefact.log({"step": 1})
        artefact.save_state({"weight": torch.ones(2)}, step=1)
        artefact.log({"step": 2})
    tensors, facts = artefact.resume()
    assert (tensors["weight"].tolist(), facts["step"], artefact.events()) == ([1, 1], 1, [{"step": 1}])
    artefact.log_file.write_text("")
    with pytest.raises(Damaged, match="shorter than the saved progress"):
        artefact.resume()


def test_a_stored_run_is_read_back_and_a_setting_it_lacks_takes_its_default(run):
    experiment = SMOKE.but(multipliers=(1, 1), dropout=0.1)
    other = Run.of(experiment, run.folder.parent)
    other.folder.mkdir()
    other.open({})
    assert Run.at(other.folder).experiment == experiment
    rewrite(run, lambda config: config["experiment"].pop("rank"))
    assert Run.at(run.folder).experiment == SMOKE
    run.check()
    with pytest.raises(LabError, match="is no run"):
        Run.at("nowhere")


SPOILT = {  # what happened to config.json -> what the sentence of Run.at says
    "the first format": (
        lambda c: c.pop("format"),
        "an earlier version .*the same `funlora run` command makes it anew",
    ),
    "a later format": (lambda c: c.update(format=store.FORMAT + 1), "another version"),
    "an unknown setting": (lambda c: c["experiment"].update(exec=1), r"another version .*\(unknown settings: exec\)"),
    "a value of the wrong kind": (lambda c: c["experiment"].update(split=3), "config.json is damaged .*split"),
    "a value not accepted": (lambda c: c["experiment"].update(precision="x"), "config.json is damaged .*precision=x"),
    "a setting without default gone": (lambda c: c["experiment"].pop("split"), "config.json is damaged .*split"),
    "no settings": (lambda c: c.pop("experiment"), "config.json holds no configuration"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_stored_run_that_cannot_be_read_says_why(run, case):
    change, said = SPOILT[case]
    rewrite(run, change)
    with pytest.raises(LabError, match=said) as caught:
        Run.at(run.folder)
    assert "\n" not in str(caught.value)
    assert [line["state"] for line in store.listing(run.folder.parent)] == [
        "damaged" if isinstance(caught.value, Damaged) else "other version"
    ]


def test_a_folder_with_another_configuration_is_refused_with_the_difference(run):
    rewrite(run, lambda config: config["experiment"].update(adapter_batch=99) or config["experiment"].pop("steps"))
    with pytest.raises(LabError, match="adapter_batch is 99 there and 16 here; steps is 4 there and 2 here"):
        run.check()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: c.update(format=store.FORMAT + 1),
            f"its format is {store.FORMAT + 1} and this program's {store.FORMAT}",
        ),
        (lambda c: c.pop("format"), f"its format is 1 and this program's {store.FORMAT}"),
        (lambda c: c["provenance"]["versions"].update({"funlora-lab": "9.9"}), "begun by funlora-lab 9.9"),
    ],
)
def test_an_unfinished_run_of_another_version_is_refused(run, change, sentence):
    rewrite(run, change)
    with pytest.raises(LabError, match=sentence):
        run.check()


@pytest.mark.parametrize("name", ["results.json", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b'{"a":\n', b"[]\n", b"\x80\n"])
def test_a_damaged_file_of_a_run_is_deleted_on_request(run, name, content):
    run.log({"event": "run"})
    run.finish(RESULTS)
    path = run.folder / name
    path.write_bytes(content)
    with pytest.raises(Damaged, match=name):
        run.check(), run.results(), run.events()
    assert [reason.path for reason in run.repair()] == [path]
    assert not path.exists()
    assert not run.results_file.exists()


def test_results_name_the_folder_as_it_is_called_now(run, tmp_path):
    run.log(RESULTS)
    run.finish(RESULTS)
    moved = run.folder.rename(tmp_path / "moved")
    assert str(run.folder) not in "".join(path.read_text() for path in moved.glob("*.json*"))
    assert Run.at(moved).results() == Run.at(moved).events()[0] == RESULTS | {"run": str(moved)}


def test_the_listing_says_the_state_of_every_run_and_survives_damaged_files(run):
    home = run.folder.parent
    runs = [Run.of(SMOKE.but(seed=seed), home) for seed in range(1, 5)]
    for each in runs:
        each.folder.mkdir()
        each.open({})
        each.finish(RESULTS)
    runs[1].results_file.write_text('{"LA": 0.')
    runs[2].config_file.write_text("[]")
    rewrite(runs[3], lambda config: config.update(format=1))
    (home / "notes").mkdir()
    found = {line["name"]: line for line in store.listing(home)}
    lines = [found[each.folder.name] for each in (run, *runs)]
    assert len(found) == 5
    assert [line["state"] for line in lines] == ["unfinished", "finished", "damaged", "damaged", "other version"]
    assert [line["settings"] and line["settings"]["seed"] for line in lines] == [0, 1, 2, None, 4]
    assert [line["results"] and line["results"]["LA"] for line in lines] == [None, 0.5, None, None, None]
    assert lines[0]["started"].startswith("2026-01-01")
    assert json.dumps(lines[0]["settings"])
    assert store.listing(home / "nowhere") == []


def test_a_run_that_is_worked_on_is_listed_as_running(run):
    seen = []
    with locked(run.folder):
        thread = threading.Thread(target=lambda: seen.extend(store.listing(run.folder.parent)))
        thread.start()
        thread.join()
    assert [line["state"] for line in seen] == ["running"]
