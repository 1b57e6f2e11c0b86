"""Several processes train the base that one process trains, and process 0 alone writes it."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from funlora_lab import shares
from funlora_lab.disk import read_tensors
from funlora_lab.distributed import ASK_EVERY, Team, _ReadingStore
from funlora_lab.errors import Stopped
from funlora_lab.presets import preset
from funlora_lab.store import Store
from funlora_lab.training import Runtime

EXPERIMENT = preset("smoke").but(log_every=1)


def torchrun(home, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "funlora_lab",
        "run",
        "smoke",
        "--set",
        "norm_groups=2",
        "--set",
        "log_every=1",
        "--device",
        "cpu",
    ]
    environment = os.environ | {"FUNLORA_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def base_of(home):
    return next((home / "artefacts").glob("network-*/result.safetensors"))


def test_two_processes_stopped_and_resumed_train_the_base_of_one(tmp_path):
    list(shares.learn(EXPERIMENT, Runtime(), tmp_path / "one"))
    asked = itertools.count()
    with pytest.raises(Stopped):  # first by one process
        list(shares.learn(EXPERIMENT, Runtime(stop=lambda: "Enough." if next(asked) == 7 else None), tmp_path / "two"))
    state = next((tmp_path / "two" / "artefacts").glob("network-*/state.safetensors"))
    assert 0 < read_tensors(state)[1]["step"] < ASK_EVERY
    stopped = torchrun(tmp_path / "two", "--classes", "6:7", "--minutes", "0.0001")
    assert stopped.count("Everything is saved") == 1, "process 0 alone speaks"
    assert read_tensors(state)[1]["step"] == ASK_EVERY
    finished = torchrun(tmp_path / "two", "--classes", "6:7")
    assert finished.count("Learned 6 in") == 1
    one, _ = read_tensors(base_of(tmp_path / "one"))
    two, facts = read_tensors(base_of(tmp_path / "two"))
    assert facts["processes"] == 2
    assert base_of(tmp_path / "one").parent.name == base_of(tmp_path / "two").parent.name
    for name, value in one.items():
        assert torch.allclose(two[name], value, rtol=0, atol=1e-5), name
    lines = [len(list(open(base_of(tmp_path / name).with_name("log.jsonl")))) for name in ("one", "two")]
    assert lines == [EXPERIMENT.base_steps] * 2, "a line of the log was lost or written twice"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_a_batch_make_the_whole_batch(size):
    batch = torch.arange(7)
    parts = [Team(rank, size).part(batch)[0] for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == batch.tolist()


def test_a_process_alone_computes_as_without_a_team():
    losses = torch.rand(5, requires_grad=True)
    assert torch.equal(Team().mean(losses, 5), losses.mean())
    assert Team().key == ()


def test_the_other_processes_write_nothing(tmp_path):
    stage = _ReadingStore(tmp_path).stage("network", seed=1)
    stage.open()
    stage.log({"event": "loss"})
    stage.save_state({"x": torch.ones(1)}, step=1)
    stage.finish({"x": torch.ones(1)})
    assert not list(tmp_path.iterdir())
    assert stage.resume() is None
    theirs = Store(tmp_path).stage("network", seed=1)
    theirs.open()
    theirs.finish({"x": torch.ones(1)})
    assert stage.done
    assert stage.result()[0]["x"].item() == 1
