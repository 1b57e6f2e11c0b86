"""A run worked off in slices of minutes ends as the run that was never stopped."""

import json

import pytest
import torch

from funlora_lab import continual
from funlora_lab.__main__ import main
from funlora_lab.disk import read_tensors
from funlora_lab.errors import Stopped
from funlora_lab.presets import preset
from funlora_lab.store import Run
from funlora_lab.training import Runtime

SMOKE = preset("smoke")


def stop_after(steps: int):
    """A budget that says stop when it was asked ``steps`` times."""
    left = steps

    def stop():
        nonlocal left
        left -= 1
        return None if left >= 0 else "The budget is spent."

    return stop


def test_three_slices_equal_one_run_bit_for_bit(smoke_home, numbers, tmp_path):
    for steps in (13, 47):  # in the judge's and the base's training
        with pytest.raises(Stopped, match="budget"):
            list(continual.run(SMOKE, Runtime(stop=stop_after(steps)), tmp_path))
        assert list((tmp_path / "artefacts").glob("*/state.safetensors")), "nothing was saved on the way"
    events = list(continual.run(SMOKE, home=tmp_path))
    expected = Run.of(SMOKE, smoke_home)
    assert numbers(tmp_path) == numbers(smoke_home)
    changing = {"seconds", "run", "provenance"}
    result = {name: value for name, value in events[-1].items() if name not in changing}
    assert result == {name: value for name, value in expected.results().items() if name not in changing}

    def losses(found):
        return [(e["stage"], e.get("class"), e["step"], e["loss"]) for e in found if e["event"] == "loss"]

    assert losses(events) == losses(Run.of(SMOKE, tmp_path).events()) == losses(expected.events())


def test_minutes_end_a_call_in_order_and_the_same_command_goes_on(smoke_home, numbers, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", str(tmp_path))
    words = ["run", "smoke", "--device", "cpu", "--minutes", "0.005"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "after 0.005 minutes" in said
    assert said.splitlines()[-1].strip() == "funlora run smoke --device cpu --minutes 0.005"
    assert main([*words, "--json"]) == 0
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["finished"] is False
    assert stopped["command"].endswith("--json")
    assert main(["run", "smoke", "--device", "cpu", "--minutes", "60", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finished"] is True
    assert result["LA"] == Run.of(SMOKE, smoke_home).results()["LA"]
    assert numbers(tmp_path) == numbers(smoke_home)


@pytest.mark.parametrize("word", ["0", "-1", "nan", "inf", "soon"])
def test_minutes_that_are_no_time_are_refused(word, capsys):
    with pytest.raises(SystemExit) as left:
        main(["run", "smoke", "--minutes", word])
    assert left.value.code == 2
    assert "--minutes" in capsys.readouterr().err


def test_bf16_trains_fp32_weights_to_almost_the_same_loss(smoke_home, tmp_path):
    events = list(continual.run(SMOKE.but(precision="bf16"), home=tmp_path))

    def last_loss(found):
        return [e["loss"] for e in found if e["event"] == "loss" and e["stage"] == "base"][-1]

    expected = last_loss(Run.of(SMOKE, smoke_home).events())
    assert last_loss(events) == pytest.approx(expected, rel=0.02)
    used = events[-1]["provenance"]["arithmetic"]
    assert (last_loss(events) != expected) == (used == "bf16"), f"{used} was said, but not used"
    for file in (tmp_path / "artefacts").glob("network-*/result.safetensors"):
        assert {value.dtype for value in read_tensors(file)[0].values()} == {torch.float32}
