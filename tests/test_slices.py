"""A run worked off by the command in slices of minutes ends as the run that was never stopped."""

import json
import shlex

import pytest
from fault_harness import EXPERIMENT, snapshot

from funlora_lab import continual, preset
from funlora_lab.__main__ import main
from funlora_lab.experiment import shown
from funlora_lab.store import Run, read_tensors

SMOKE = preset("smoke")


def test_minutes_end_a_call_in_order_and_the_same_command_goes_on(smoke_home, numbers, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", str(tmp_path))
    words = ["run", "smoke", "--device", "cpu", "--set", "data_root=my data"]
    assert main([*words, "--minutes", "0.005"]) == 0
    said = capsys.readouterr().out
    assert "after 0.005 minutes" in said
    printed = shlex.split(said.splitlines()[-1])
    assert printed == ["funlora", *words, "--minutes", "0.005"]
    assert main([*printed[1:], "--json"]) == 0
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["finished"] is False
    assert stopped["command"].endswith("--json")
    assert main([*words, "--minutes", "60", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finished"] is True
    assert result["LA"] == Run.of(SMOKE, smoke_home).results()["LA"]
    assert numbers(tmp_path) == numbers(smoke_home)


def test_minutes_too_short_for_a_step_still_come_to_an_end(tmp_path, monkeypatch, capsys):
    homes = [tmp_path / "slices", tmp_path / "whole"]
    experiment = EXPERIMENT.but(samples_per_class=10, chunk=10)  # as many as the pictures show
    changes = experiment.unlike(SMOKE).items()
    words = ["run", "smoke", "--device", "cpu", "--json", *(f"--set={name}={shown(value)}" for name, value in changes)]
    monkeypatch.setenv("FUNLORA_HOME", str(homes[0]))
    calls, finished = 0, False
    while not finished and calls < 100:
        assert main([*words, "--minutes", "1e-9"]) == 0
        calls, finished = calls + 1, json.loads(capsys.readouterr().out)["finished"]
    assert 10 < calls < 100
    continual.run(experiment, home=homes[1])
    sliced, whole = (snapshot(home) for home in homes)
    assert {name: sliced[name] for name in whole} == whole


def test_bf16_trains_fp32_weights_to_almost_the_same_loss(smoke_home, tmp_path):
    events = []
    results = continual.run(SMOKE.but(precision="bf16"), events.append, home=tmp_path)

    def last_loss(found):
        return [e["loss"] for e in found if e["event"] == "loss" and e["stage"] == "base"][-1]

    expected = last_loss(Run.of(SMOKE, smoke_home).events())
    assert last_loss(events) == pytest.approx(expected, rel=0.02)
    used = results["provenance"]["arithmetic"]
    assert (last_loss(events) != expected) == (used == "bf16"), f"{used} was said, but not used"
    for file in (tmp_path / "artefacts").glob("network-*/result.safetensors"):
        assert {str(value.dtype) for value in read_tensors(file)[0].values()} == {"torch.float32"}
