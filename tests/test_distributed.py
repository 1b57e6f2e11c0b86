"""Several processes train the base that one process trains, and process 0 alone writes it."""

import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys

import pytest
import torch

from funlora_lab import preset
from funlora_lab.continual import learn_base
from funlora_lab.errors import LabError, Stopped
from funlora_lab.store import Artefact, read_lines, read_tensors
from funlora_lab.training import Runtime, Team, team_of
from funlora_lab.training.processes import ASK_EVERY

FORK = multiprocessing.get_context("fork")
EXPERIMENT = preset("smoke").but(log_every=1)


def torchrun(home, *words):
    """The whole command in two processes -> what they printed, as JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "funlora_lab", "run", "smoke", "--set", "log_every=1", "--device", "cpu", "--json"]
    environment = os.environ | {"FUNLORA_HOME": str(home)}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # process 0 alone speaks


def base_of(home):
    return next(home.glob("artefacts/network-*"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A home with the base that one process trained."""
    home = tmp_path_factory.mktemp("alone")
    learn_base(EXPERIMENT, Runtime(), home)
    return home


def compare(alone, home):
    """The base of a home was trained by two processes, without losing a line, to the weights of ``alone``."""
    one, two = base_of(alone), base_of(home)
    assert one.name == two.name
    weights, facts = read_tensors(two / "result.safetensors")
    assert facts["processes"] == 2
    for name, value in read_tensors(one / "result.safetensors")[0].items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)
    lines = [[(e["step"], e["images"]) for e in read_lines(home / "log.jsonl")] for home in (one, two)]
    assert lines[0] == lines[1], "a line of the log was lost or written twice"
    assert len(lines[0]) == EXPERIMENT.base.steps
    assert not list(home.rglob("state.safetensors"))


def stopped_by_one(home):
    """Train the first seven steps in one process -> the file of the saved progress."""
    questions = itertools.count()
    stop = Runtime(stop=lambda: "Enough." if next(questions) == 6 else None)
    with pytest.raises(Stopped):
        learn_base(EXPERIMENT, stop, home)
    state = base_of(home) / "state.safetensors"
    assert read_tensors(state)[1]["step"] == 7 < ASK_EVERY
    return state


def work(rank, port, home, reason):
    """What each of two processes does, in a home of its own; it ends with the status 2 when it was stopped."""
    home = home / "other" if rank else home
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with team_of(torch.device("cpu")) as team:
        try:
            learn_base(EXPERIMENT, Runtime(stop=lambda: reason, team=team), home)
        except Stopped:
            sys.exit(2)


def in_two_processes(home, reason=None):
    """Train the base in two processes, of which the first is always told the same -> their statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORK.Process(target=work, args=(rank, port, home, reason)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd's threads for a GPU do not survive a fork")
def test_two_processes_stopped_and_resumed_train_the_base_of_one(alone, tmp_path):
    state = stopped_by_one(tmp_path)
    assert in_two_processes(tmp_path, "Enough.") == [2, 2]
    assert read_tensors(state)[1]["step"] == ASK_EVERY
    assert in_two_processes(tmp_path) == [0, 0]
    compare(alone, tmp_path)
    assert not (tmp_path / "other").exists()


@pytest.mark.heavy
def test_the_command_under_torchrun_stopped_and_resumed_trains_the_base_of_one(alone, tmp_path):
    state = stopped_by_one(tmp_path)
    assert torchrun(tmp_path, "--minutes", "0.0001")["finished"] is False
    assert read_tensors(state)[1]["step"] == ASK_EVERY
    assert torchrun(tmp_path)["finished"] is True
    compare(alone, tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_a_batch_make_the_whole_batch(size):
    batch = torch.arange(7)
    parts = [Team(rank, size).part(batch)[0] for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == batch.tolist()


def test_a_process_alone_computes_as_without_a_team():
    losses, team, net = torch.rand(5, requires_grad=True), Team(), torch.nn.Linear(2, 2)
    assert torch.equal(team.mean(losses, 5), losses.mean())
    assert team.wrap(net) is net
    assert (team.key, team.agree(3), team.ask(lambda: "Enough.", 1)) == ((), 3, "Enough.")


def test_several_processes_ask_at_every_tenth_step_and_each_gets_an_image():
    asked = []
    assert Team(0, 2).ask(lambda: asked.append(1), ASK_EVERY - 1) is None
    assert not asked
    with pytest.raises(LabError, match="base_batch=2: accepted is at least the number of processes, 3"):
        Team(0, 3).part(torch.arange(2))


def test_the_other_processes_read_and_write_nothing(tmp_path):
    artefact = Team(1, 2).store(tmp_path).artefact("network", seed=1)
    with artefact.held(lambda: None, print):
        artefact.open()
    artefact.log({"event": "loss"})
    artefact.save_state({"x": torch.ones(1)}, step=1)
    artefact.finish({"x": torch.ones(1)})
    assert not list(tmp_path.iterdir())
    assert artefact.resume() is None
    theirs = Team(0, 2).store(tmp_path).artefact("network", seed=1)
    assert (theirs.name, type(theirs)) == (artefact.name, Artefact)
    theirs.open()
    theirs.finish({"x": torch.ones(1)})
    assert theirs.result()[0]["x"].item() == 1
    assert (artefact.done, artefact.result()) == (True, None)
