"""The scripts for a lease of one GPU: what they pack comes back, and what they run is what they say."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from funlora_lab import preset
from funlora_lab.experiment import override
from funlora_lab.store import write_tensors
from funlora_lab.systems import solver_of
from funlora_lab.unet import read_checkpoint

KIT = Path(__file__).resolve().parents[1] / "figures" / "cifar10"


@pytest.fixture
def kit(monkeypatch, tmp_path):
    """(lease, parts), with folders of their own."""
    monkeypatch.syspath_prepend(str(KIT))
    for name in ("KEEP", "OUT"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("lease", "parts"):
        sys.modules.pop(name, None)
    import lease
    import parts

    return lease, parts


def test_the_average_of_an_unfinished_base_and_small_files_come_back(kit, tmp_path, monkeypatch):
    _, parts = kit
    monkeypatch.setattr(parts, "PART", 2**17)
    weights = {"a.weight": torch.randn(500, 300), "b": torch.randn(5)}
    state = {
        f"{kind}/{name}": value + (kind == "weight")
        for kind in ("weight", "average")
        for name, value in weights.items()
    }
    runs, out, keep = tmp_path / "runs", tmp_path / "out", tmp_path / "keep"
    for file, tensors in {
        "network-1/state": state,
        "network-0/result": {"b": torch.zeros(5)},
        "samples-0/chunk-00000": {"images": torch.zeros(10**5)},
    }.items():
        path = runs / "artefacts" / f"{file}.safetensors"
        path.parent.mkdir(parents=True)
        write_tensors(path, tensors, {})
    (runs / "run").mkdir()
    (runs / "run" / "results.json").write_text("{}")
    out.mkdir()
    parts.pack(runs, out)
    assert all(path.stat().st_size <= parts.PART for path in out.iterdir())
    assert len(list(out.glob("base-*"))) > 1
    parts.unpack(out, keep)
    found = read_checkpoint(keep / "base.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value.bfloat16().float()) for name, value in weights.items())
    assert (keep / "runs" / "run" / "results.json").read_text() == "{}"
    assert (keep / "runs" / "artefacts" / "network-0" / "result.safetensors").exists()
    assert not (keep / "runs" / "artefacts" / "samples-0").exists()


def test_the_full_network_is_drawn_from_in_few_steps_that_bf16_can_follow(kit):
    lease, parts = kit
    full = override(preset("cifar10"), lease.SIZE.split())
    assert full.precision == parts.EXPERIMENT.precision == "bf16"
    assert not solver_of(full).adaptive
    assert full.unlike(preset("cifar10")).keys() >= {"solver", "precision", "steps", "chunk", "lanes", "base_ema_start"}


def test_a_part_that_takes_too_long_is_ended_and_the_lease_goes_on(kit, tmp_path):
    lease, _ = kit
    begun, lent = time.monotonic(), lease.Lease(100)
    assert lent.call(2, "slow", "-c", "print('begun', flush=True); import time; time.sleep(60)") == "begun\n"
    assert time.monotonic() - begun < 30
    assert lent.call(60, "quick", "-c", "print('one'); print('two')") == "two\n"
    assert (tmp_path / "OUT" / "lease.log").read_text().split("\n")[::3] == ["begun", "two"]


def test_a_word_too_many_says_how_it_is_called(tmp_path):
    given = {"env": os.environ | {"KEEP": str(tmp_path), "OUT": str(tmp_path)}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, KIT / "lease.py", "first", "30"], **given)
    assert done.returncode == 1
    assert "lease.py SECONDS" in done.stderr
    assert not list(tmp_path.iterdir())
