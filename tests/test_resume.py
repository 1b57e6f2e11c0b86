"""Whatever interrupts a run, the resumed one leaves the files of an undisturbed one, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fault_harness import EXPERIMENT, snapshot

from funlora_lab import continual, preset
from funlora_lab.diffusion import SAMPLERS, Sampler, Schedule
from funlora_lab.errors import LabError, Stopped
from funlora_lab.experiment import shown
from funlora_lab.flow import SOLVERS, Solver
from funlora_lab.seeds import stream
from funlora_lab.store import Artefact, Run, Store, in_use, read_lines
from funlora_lab.training import Plan, Runtime, Trainer, device


def stop_after(questions: int):
    """A ``stop`` that says yes to every question but the first ones."""
    left = iter(range(questions))
    return lambda: None if next(left, None) is not None else "Enough."


def losses(events):
    return [(e["stage"], e.get("class"), e["step"], e["loss"]) for e in events if e["event"] == "loss"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    home = tmp_path_factory.mktemp("undisturbed")
    continual.run(EXPERIMENT, home=home)
    return snapshot(home)


@pytest.mark.heavy
def test_kills_faulty_writes_and_twins_leave_no_difference():
    harness = Path(__file__).with_name("fault_harness.py")
    command = [sys.executable, harness, "--kills", "3", "--every", "60", "--pairs", "2"]
    ended = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(ended.stdout)
    assert ended.returncode == 0, report
    assert (report["differences"], report["lost"], report["tracebacks"]) == (0, 0, 0)
    assert report["kills"] >= 3
    assert sum(report["faults"].values()) >= 9


@pytest.mark.parametrize("questions", [0, 5])
def test_stopped_again_and_again_a_run_gets_on_and_ends_the_same(expected, tmp_path, questions):
    """Also with a stop that says yes to every question: it is asked after every step and every chunk of samples."""
    stops, states = 0, set()
    while stops < 100:
        events = []
        try:
            continual.run(EXPERIMENT, events.append, Runtime(stop=stop_after(questions)), tmp_path)
            break
        except Stopped:
            stops += 1
            states |= {path.parent.name.partition("-")[0] for path in tmp_path.glob("artefacts/*/state.safetensors")}
    assert snapshot(tmp_path) == expected
    assert losses(events) == losses(Run.of(EXPERIMENT, tmp_path).events())
    assert states == {"network", "adapters", "classifier"} or questions
    ends = [e["steps"] for e in events if e["event"] == "loss" and e["step"] == e["steps"] and e.get("class") != 9]
    chunks = len(list(tmp_path.glob("artefacts/samples-*/chunk-*")))
    asked = sum(ends) - len(ends) + chunks  # the adapters of the classes 8 and 9 are one training
    assert stops == asked // (questions + 1)


def test_a_smoke_run_in_three_slices_is_the_one_that_was_never_stopped(smoke_home, numbers, tmp_path):
    smoke = preset("smoke")
    for questions in (13, 47):  # in the training of the judge, then in that of the base
        with pytest.raises(Stopped, match="Enough"):
            continual.run(smoke, runtime=Runtime(stop=stop_after(questions)), home=tmp_path)
        assert list(tmp_path.glob("artefacts/*/state.safetensors")), "nothing was saved on the way"
    events, undisturbed = [], Run.of(smoke, smoke_home)
    result, other = continual.run(smoke, events.append, home=tmp_path), undisturbed.results()
    assert numbers(tmp_path) == numbers(smoke_home)
    assert {name for name in result.keys() | other if result[name] != other[name]} <= {"seconds", "run", "provenance"}
    assert losses(events) == losses(undisturbed.events())


def test_a_group_broken_off_between_two_members_goes_on_as_that_group(expected, tmp_path, monkeypatch):
    """One class has its adapter, its companion not yet: training it alone would give other last bits."""
    finish, finished = Artefact.finish, []

    def once(artefact, tensors, **facts):
        if artefact.kind == "adapter":
            finished.append(artefact.key)
            if len(finished) == 2:
                raise KeyboardInterrupt
        finish(artefact, tensors, **facts)

    monkeypatch.setattr(Artefact, "finish", once)
    with pytest.raises(KeyboardInterrupt):
        continual.run(EXPERIMENT, home=tmp_path)
    monkeypatch.setattr(Artefact, "finish", finish)
    events = []
    continual.run(EXPERIMENT, events.append, home=tmp_path)
    assert snapshot(tmp_path) == expected
    assert [e for e in events if e.get("stage") == "adapter" and "replayed" not in e] == []


def test_a_second_reading_logs_in_the_same_order_and_a_lost_adapter_changes_the_order_at_most(expected, tmp_path):
    continual.run(EXPERIMENT, home=tmp_path)
    run = Run.of(EXPERIMENT, tmp_path)
    run.results_file.unlink()
    continual.run(EXPERIMENT, home=tmp_path)
    assert snapshot(tmp_path) == expected

    def lines():
        return sorted((e["stage"], e.get("class", 0), e["step"]) for e in read_lines(run.log_file) if "stage" in e)

    before = lines()
    run.results_file.unlink()
    for path in min(tmp_path.glob("artefacts/adapter-*")).iterdir():
        path.unlink()
    continual.run(EXPERIMENT, home=tmp_path)
    assert lines() == before


def test_a_report_that_raises_frees_the_run_at_once(expected, tmp_path):
    """A notebook cell interrupted in the middle of a training is simply run again."""

    def interrupted(event):
        if event.get("stage") == "base":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continual.run(EXPERIMENT, interrupted, home=tmp_path)
    folders = [path.parent for path in tmp_path.rglob(".lock")]
    with ThreadPoolExecutor(1) as other:  # the thread that holds a folder may hold it again
        assert not any(other.map(in_use, folders))
    assert len(folders) == 2, "the run and its base"
    continual.run(EXPERIMENT, home=tmp_path)
    assert snapshot(tmp_path) == expected


def test_sigterm_saves_and_says_how_to_go_on(expected, tmp_path):
    settings = [f"{name}={shown(value)}" for name, value in EXPERIMENT.unlike(preset("smoke")).items()]
    command = [sys.executable, "-m", "funlora_lab", "run", "smoke", *(x for word in settings for x in ("--set", word))]
    environment = os.environ | {"FUNLORA_HOME": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = Run.of(EXPERIMENT, tmp_path).log_file
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    continual.run(EXPERIMENT, home=tmp_path)
    assert {name: text for name, text in snapshot(tmp_path).items() if not name.endswith(".png")} == expected


def test_a_jumping_clock_changes_nothing(expected, tmp_path, monkeypatch):
    times, events = iter(range(10**9, 0, -1000)), []
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    continual.run(EXPERIMENT, events.append, Runtime(save_seconds=0), tmp_path)
    assert snapshot(tmp_path) == expected
    assert all(event["seconds"] >= 0 for event in events if event["event"] in ("loss", "samples"))


def step_alone(step):
    return {"step": torch.tensor(step)}


def toy(folder, loss, **runtime):
    """The training of one number under ``loss(weight, step)``."""
    artefact, weight = Store(folder).artefact("toy"), torch.zeros(1, requires_grad=True)
    artefact.open()
    plan, optimizer = Plan(steps=10, batch=1, rate=0.1, log_every=4), torch.optim.SGD([weight], lr=0.1)
    given = (step_alone, lambda inputs: loss(weight, inputs["step"]), Runtime(**runtime), [{"stage": "toy"}])
    return Trainer(artefact, plan, optimizer, {"w": weight}, *given)


def bad_loss(bad):
    return lambda w, step: (w - 1) ** 2 * (bad if step == 6 else 1.0)


def bad_gradient(w, step):
    """The loss is still finite at the step whose gradient is not."""
    return (w - w.detach()).abs().sqrt() + 1 if step == 6 else w * 1.0


@pytest.mark.parametrize(
    ("loss", "saying"),
    [
        (bad_loss(float("nan")), "toy was not finite at step 7"),
        (bad_loss(float("inf")), "toy was not finite at step 7"),
        (bad_gradient, "weights of the toy were not finite after step 7"),
    ],
)
def test_numbers_that_are_not_finite_name_the_step_and_the_state_before_is_kept(tmp_path, loss, saying):
    trainer = toy(tmp_path, loss, save_seconds=0)
    with pytest.raises(LabError, match=saying):
        trainer.fit()
    tensors, facts = trainer.artefact.resume()
    assert facts["step"] == 6
    assert torch.isfinite(tensors["weight/w"]).all()


def test_out_of_memory_says_what_to_lower(tmp_path):
    def loss(w, step):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(LabError, match="lower base_batch"):
        toy(tmp_path, loss).fit()


def test_a_state_of_another_program_and_a_log_shorter_than_it_remembers_are_refused(tmp_path):
    trainer = toy(tmp_path, lambda w, step: (w - 1) ** 2, stop=stop_after(7))
    with pytest.raises(Stopped):
        trainer.fit()
    assert trainer.artefact.resume()[1]["step"] == 8
    content = trainer.artefact.log_file.read_bytes()
    trainer.artefact.log_file.write_bytes(b"")
    with pytest.raises(LabError, match="shorter than the saved progress remembers"):
        toy(tmp_path, lambda w, step: w)
    trainer.artefact.log_file.write_bytes(content)
    trainer.artefact.save_state({"weight/other": torch.ones(1), "losses": torch.zeros(0, 1)}, step=1, seconds=0.0)
    with pytest.raises(LabError, match="another version of the program"):
        toy(tmp_path, lambda w, step: w)


def test_channels_last_parameters_resume_bit_for_bit(tmp_path):
    """Fused Adam pairs weight and state in memory order, so restored state needs the layout of its parameter."""
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def trained(home, questions):
        conv = torch.nn.utils.skip_init(torch.nn.Conv2d, 3, 4, 3).to(memory_format=torch.channels_last)
        parameters, artefact = dict(conv.named_parameters()), Store(tmp_path / home).artefact("toy")
        with torch.no_grad():
            for value in parameters.values():
                value.copy_(torch.linspace(-1, 1, value.numel()).reshape(value.shape))
        assert not conv.weight.is_contiguous()
        artefact.open()
        optimizer = torch.optim.Adam(parameters.values(), lr=0.1, fused=True)
        runtime, plan = Runtime(stop=stop_after(questions)), Plan(steps=9, batch=1, rate=0.1, ema=0.9)
        given = (step_alone, lambda inputs: (conv(x) ** 2).mean()[None], runtime, [{"stage": "toy"}])
        return Trainer(artefact, plan, optimizer, parameters, *given).fit()[0]

    undisturbed = trained("undisturbed", 100)
    for _ in range(2):
        with pytest.raises(Stopped):
            trained("stopped", 3)
    resumed = trained("stopped", 3)
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())


@pytest.mark.parametrize("method", ["funlora", "fine-tune"])
def test_steps_read_from_a_table_as_a_gpu_replays_them_give_the_same_bits(method, tmp_path, monkeypatch, numbers):
    """The same functions as on a GPU, where a graph of them is replayed: inputs in a table, losses in a ring."""
    experiment = EXPERIMENT.but(method=method, dropout=0.1, base_images=20 * EXPERIMENT.base.batch)
    continual.run(experiment, home=tmp_path / "called")
    rows = []
    monkeypatch.setattr(device.Steps, "__call__", lambda self, step: rows.append(step) or self.replay(step))
    monkeypatch.setattr(device, "ROWS", 7)
    continual.run(experiment, home=tmp_path / "replayed")
    assert max(rows) == 19
    assert numbers(tmp_path / "called") == numbers(tmp_path / "replayed")


SCORES = (None, lambda x: x.square().mean((1, 2, 3)))
DRAWN_BY = [Solver(name, 3, 1e-2) for name in SOLVERS]
DRAWN_BY += [Sampler(Schedule("cosine"), name, 5, score=score) for name in SAMPLERS for score in SCORES]


@pytest.mark.parametrize("solver", DRAWN_BY, ids=lambda solver: solver.name)
def test_solver_steps_as_a_gpu_replays_them_give_the_same_bits(solver, monkeypatch):
    """The same functions as on a GPU, where a graph of one is replayed: its inputs lie in memory that stays."""
    recorded, chunks = [], torch.randn(2, 4, 1, 3, 3, generator=stream(0, "noise"))
    monkeypatch.setattr(device, "Recorded", lambda function, device: recorded.append(function) or function)
    replaying = replace(solver, repeated=device.replays(torch.device("cuda")))

    def field(t, x):
        return torch.tanh(2 * x) * torch.cos(t).reshape(-1, 1, 1, 1)

    for x0 in chunks:
        (expected, evaluations), (found, counted) = (each.integrate(field, x0) for each in (solver, replaying))
        assert torch.equal(expected, found)
        assert evaluations == counted
    assert len(recorded) == 1, "one graph for all steps of all chunks"


def test_what_a_gpu_runs_can_be_recorded_without_one(monkeypatch):
    """Where recording fails the function goes on being called, and a warning says why, once."""
    calls, recorded = [], device.Recorded(lambda: calls.append(1), torch.device("cpu"))
    recorded.warm = 2

    def no_graph():
        raise RuntimeError("no graph here\nand a long story")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", no_graph)
    recorded()
    recorded()
    with pytest.warns(UserWarning, match="without a CUDA graph: no graph here$"):
        recorded()
    recorded()
    assert len(calls) == 4
