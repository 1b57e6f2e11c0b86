"""Whatever interrupts a run, the resumed one leaves the files of an undisturbed one, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fault_harness import EXPERIMENT, snapshot

from funlora_lab import continual
from funlora_lab.disk import read_lines
from funlora_lab.errors import LabError, Stopped
from funlora_lab.presets import PRESETS
from funlora_lab.store import Run, Store
from funlora_lab.training import Plan, Runtime, fit

HERE = Path(__file__).parent


def exhaust(events):
    return list(events)


def stop_after(calls: int):
    """A ``stop`` that asks for the end at its ``calls``-th question."""
    left = iter(range(calls))
    return lambda: None if next(left, None) is not None else "Enough."


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    home = tmp_path_factory.mktemp("undisturbed")
    exhaust(continual.run(EXPERIMENT, home=home))
    return snapshot(home)


def test_kills_faulty_writes_and_twins_leave_no_difference():
    command = [sys.executable, HERE / "fault_harness.py", "--kills", "3", "--every", "60", "--pairs", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report = json.loads(ended.stdout)
    assert ended.returncode == 0, report
    assert (report["differences"], report["lost"], report["tracebacks"]) == (0, 0, 0)
    assert report["kills"] >= 3
    assert sum(report["faults"].values()) >= 9


def test_stopped_again_and_again_a_run_ends_the_same(expected, tmp_path):
    stops = 0
    while True:
        try:
            exhaust(continual.run(EXPERIMENT, Runtime(stop=stop_after(5)), tmp_path))
            break
        except Stopped:
            stops += 1
    assert stops > 4
    assert snapshot(tmp_path) == expected


def test_a_group_broken_off_between_two_members_goes_on_as_that_group(expected, tmp_path, monkeypatch):
    """One class has its adapter, its companion not yet: training it alone would give other last bits."""
    from funlora_lab.store import Stage

    finish, finished = Stage.finish, []

    def once(stage, tensors, **facts):
        if stage.kind == "adapter":
            finished.append(stage.key)
            if len(finished) == 2:
                raise KeyboardInterrupt
        finish(stage, tensors, **facts)

    monkeypatch.setattr(Stage, "finish", once)
    with pytest.raises(KeyboardInterrupt):
        exhaust(continual.run(EXPERIMENT, home=tmp_path))
    monkeypatch.undo()
    events = exhaust(continual.run(EXPERIMENT, home=tmp_path))
    assert snapshot(tmp_path) == expected
    assert [e for e in events if e.get("stage") == "adapter" and "replayed" not in e] == []


def test_a_class_stored_from_elsewhere_keeps_its_place_in_the_log(expected, tmp_path):
    """With the adapter of one class gone, the log still tells both classes in the order of an undisturbed run."""
    exhaust(continual.run(EXPERIMENT, home=tmp_path))
    run = Run.of(EXPERIMENT, tmp_path)
    run.results_file.unlink()
    adapter = sorted(tmp_path.glob("artefacts/adapter-*"))[0]
    for path in adapter.iterdir():
        path.unlink()
    exhaust(continual.run(EXPERIMENT, home=tmp_path))
    name = str(run.log_file.relative_to(tmp_path))
    order = [
        [(e["step"], e["class"]) for e in log if e.get("stage") == "adapter"]
        for log in (json.loads(expected[name]), read_lines(run.log_file))
    ]
    assert order[0] == order[1]


def test_closing_the_generator_frees_the_run_at_once(expected, tmp_path):
    events = continual.run(EXPERIMENT, home=tmp_path)
    for event in events:
        if event.get("stage") == "base":
            break
    events.close()
    exhaust(continual.run(EXPERIMENT, home=tmp_path))
    assert snapshot(tmp_path) == expected


def test_an_abandoned_generator_does_not_block_the_same_thread(tmp_path):
    """A notebook cell interrupted between two events is simply run again."""
    abandoned = continual.run(EXPERIMENT, home=tmp_path)
    for event in abandoned:
        if event.get("stage") == "base":
            break
    assert exhaust(continual.run(EXPERIMENT, home=tmp_path))[-1]["event"] == "result"


def test_sigterm_saves_and_says_how_to_go_on(expected, tmp_path):
    settings = {key: value for key, value in vars(EXPERIMENT).items() if value != getattr(PRESETS["smoke"], key)}
    words = [f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in settings.items()]
    command = [sys.executable, "-m", "funlora_lab", "run", "smoke", *(x for word in words for x in ("--set", word))]
    environment = {**os.environ, "FUNLORA_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = Run.of(EXPERIMENT, tmp_path).log_file
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    exhaust(continual.run(EXPERIMENT, home=tmp_path))
    assert {name: text for name, text in snapshot(tmp_path).items() if not name.endswith(".png")} == expected


def toy(folder, losses, **runtime):
    """Train one number with ``fit`` under given losses; ``losses(weight, step)``."""
    weight = torch.zeros(1, requires_grad=True)
    stage = Store(folder).stage("toy")
    plan = Plan(steps=10, batch=1, rate=0.1, log_every=4)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    stage.open()
    return stage, fit(
        stage, plan, optimizer, {"w": weight}, lambda step: losses(weight, step), Runtime(**runtime), [{"stage": "toy"}]
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_state_before(tmp_path, bad):
    stage, events = toy(tmp_path, lambda w, step: (w - 1) ** 2 * (bad if step == 6 else 1.0), save_seconds=0)
    with pytest.raises(LabError, match="toy was not finite at step 7"):
        exhaust(events)
    tensors, facts = stage.resume()
    assert facts["step"] == 6
    assert torch.isfinite(tensors["weight/w"]).all()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The loss is still finite at the step whose gradient is not."""

    def losses(w, step):
        return w * (float("inf") if step == 6 else 1.0) if step != 6 else (w - w.detach()).abs().sqrt() + 1

    stage, events = toy(tmp_path, losses, save_seconds=0)
    with pytest.raises(LabError, match="weights of the toy were not finite after step 7"):
        exhaust(events)
    tensors, facts = stage.resume()
    assert facts["step"] == 6
    assert torch.isfinite(tensors["weight/w"]).all()


def test_out_of_memory_says_what_to_lower(tmp_path):
    def losses(w, step):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    _, events = toy(tmp_path, losses)
    with pytest.raises(LabError, match="lower base_batch"):
        exhaust(events)


def test_a_jumping_clock_changes_nothing(expected, tmp_path, monkeypatch):
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    events = exhaust(continual.run(EXPERIMENT, Runtime(save_seconds=0), tmp_path))
    assert snapshot(tmp_path) == expected
    assert all(event["seconds"] >= 0 for event in events if event["event"] in ("loss", "samples"))


def test_a_log_shorter_than_the_state_remembers_is_refused(tmp_path):
    stage, events = toy(tmp_path, lambda w, step: (w - 1) ** 2, stop=stop_after(7))
    with pytest.raises(Stopped):
        exhaust(events)
    stage.log_file.write_bytes(b"")
    with pytest.raises(LabError, match="shorter than the saved progress remembers"):
        stage.resume()
