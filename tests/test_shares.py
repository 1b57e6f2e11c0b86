"""Shares of a run, learned apart and merged, make the run that one machine makes alone."""

import json
import shutil

import pytest
import torch

from funlora_lab import continual, shares
from funlora_lab.__main__ import main
from funlora_lab.disk import read_tensors, write_tensors
from funlora_lab.errors import LabError
from funlora_lab.presets import preset
from funlora_lab.store import Run
from funlora_lab.training import Runtime

SMOKE = preset("smoke")
TASKS = [[4, 2], [0, 1, 3], [5, 6, 7]]


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Two homes, each with its own base and half of the later classes."""
    homes = [tmp_path_factory.mktemp(f"worker{i}") for i in (1, 2)]
    for i, home in enumerate(homes, 1):
        events = list(shares.learn(SMOKE, Runtime(), home, worker=f"{i}/2"))
        assert events[-1]["classes"] == [["6", "7"], ["8", "9"]][i - 1]
    return homes


def copy(home, to):
    return shutil.copytree(home, to / home.name)


def kept(result):
    return {name: value for name, value in result.items() if name not in ("seconds", "run", "provenance")}


def test_two_shares_merged_equal_the_single_run_bit_for_bit(smoke_home, workers, numbers, tmp_path):
    facts = shares.merge(workers, tmp_path)
    assert facts["brought"] == {"adapter": 4, "adapters": 2, "network": 1, "samples": 4}
    assert facts["known"] == 1, "the base of the second share is the same"
    base = numbers(tmp_path)[f"{next((tmp_path / 'artefacts').glob('network-*')).name}/result.safetensors"]
    for adapter in (tmp_path / "artefacts").glob("adapter-*/result.safetensors"):
        assert read_tensors(adapter)[1]["base"] == base, "an adapter does not say over which base it was learned"
    brought = numbers(tmp_path)
    result = list(continual.run(SMOKE, home=tmp_path))[-1]
    assert kept(result) == kept(Run.of(SMOKE, smoke_home).results())
    assert numbers(tmp_path) == numbers(smoke_home)
    assert brought.items() <= numbers(tmp_path).items(), "nothing that was brought is trained again"


def test_shares_finer_than_a_group_equal_the_single_run_up_to_rounding(smoke_home, workers, tmp_path):
    networks = [path for path in (workers[0] / "artefacts").glob("network-*")]
    for name, classes in (("a", "6:7"), ("b", "7:10")):
        for network in networks:
            shutil.copytree(network, tmp_path / name / "artefacts" / network.name)
        list(shares.learn(SMOKE, Runtime(), tmp_path / name, classes=classes))
    shares.merge([tmp_path / "a"], tmp_path / "b")
    result = list(continual.run(SMOKE, home=tmp_path / "b"))[-1]
    assert result["flow_loss"] == pytest.approx(Run.of(SMOKE, smoke_home).results()["flow_loss"], abs=1e-4)
    for path in (smoke_home / "artefacts").glob("adapter-*/result.safetensors"):
        mine = read_tensors(tmp_path / "b" / "artefacts" / path.parent.name / path.name)[0]
        for name, value in read_tensors(path)[0].items():
            assert torch.allclose(mine[name], value, atol=1e-3), name


def test_a_share_repeated_changes_nothing(workers, numbers, tmp_path):
    home = copy(workers[0], tmp_path)
    before = numbers(home)
    events = list(shares.learn(SMOKE, Runtime(), home, worker="1/2"))
    assert all("replayed" in event for event in events[:-1])
    assert numbers(home) == before


@pytest.mark.parametrize("workers", range(1, 7))
def test_workers_divide_the_later_classes_without_gap_or_overlap(workers):
    groups = TASKS[1:]
    mine = [shares.part_of(f"{i}/{workers}", groups) for i in range(1, workers + 1)]
    assert [cls for part in mine for cls in part] == [0, 1, 3, 5, 6, 7]
    assert all(mine)
    if workers <= len(groups):
        assert all(part in (groups[0], groups[1], groups[0] + groups[1]) for part in mine), "a group was torn apart"


@pytest.mark.parametrize("words", ["0:3", "1:2", "3:3", "5:4", "2:9", "7", "a:b", "2:", ""])
def test_positions_outside_the_later_classes_are_refused(words):
    with pytest.raises(LabError, match=r"from 2 .* up to 8, as 2:8"):
        shares.positions(words, TASKS)


@pytest.mark.parametrize("words", ["0/2", "3/2", "1/7", "2", "1/0", "x/y", ""])
def test_workers_that_do_not_exist_are_refused(words):
    with pytest.raises(LabError, match="accepted is a worker"):
        shares.part_of(words, TASKS[1:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "0:3"], "--classes 0:3"),
        (["--worker", "9/2"], "--worker 9/2"),
        (["--worker", "1/2", "--method", "fine-tune"], "method=fine-tune"),
        (["--worker", "1/2", "--method", "classifier-multitask"], "method=classifier-multitask"),
    ],
)
def test_a_share_that_does_not_fit_is_refused_before_anything_is_written(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", str(tmp_path / "home"))
    assert main(["run", "smoke", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def spoil_checksum(home):
    file = next((home / "artefacts").glob("adapter-*/result.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def rename(home):
    stage = next((home / "artefacts").glob("adapter-*"))
    stage.rename(stage.with_name("adapter-0123456789abcdef"))


def lose_inputs(home):
    next((home / "artefacts").glob("adapter-*/inputs.json")).unlink()


def another_base(home):
    """A base of the same key computed elsewhere, which went missing on the way."""
    shutil.rmtree(next((home / "artefacts").glob("network-*")))
    file = next((home / "artefacts").glob("adapter-*/result.safetensors"))
    tensors, facts = read_tensors(file)
    write_tensors(file, tensors, facts | {"base": "f" * 64})


def other_numbers(home):
    file = next((home / "artefacts").glob("network-*/result.safetensors"))
    tensors, facts = read_tensors(file)
    tensors["label_emb.weight"][0, 0] += 1e-6
    write_tensors(file, tensors, facts)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_checksum, "is damaged"),
        (rename, "not what its name says"),
        (lose_inputs, "not what its name says"),
        (another_base, "over another base"),
        (other_numbers, "different numbers"),
        (lambda home: shutil.rmtree(home / "artefacts"), "no artefacts"),
    ],
)
def test_a_wrong_share_is_refused_and_nothing_is_copied(spoil, said, workers, numbers, tmp_path):
    here, there = copy(workers[0], tmp_path), copy(workers[1], tmp_path)
    spoil(there)
    before = numbers(here)
    with pytest.raises(LabError, match=said):
        shares.merge([there], here)
    assert numbers(here) == before


def test_merging_again_brings_nothing_and_leaves_unfinished_work_out(workers, tmp_path, monkeypatch, capsys):
    here, there = copy(workers[0], tmp_path), copy(workers[1], tmp_path)
    adapter = next((there / "artefacts").glob("adapter-*/result.safetensors"))
    adapter.rename(adapter.with_name("state.safetensors"))
    monkeypatch.setenv("FUNLORA_HOME", str(here))
    assert main(["merge", str(there), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unfinished"] == 1
    assert main(["merge", str(there)]) == 0
    assert "nothing new" in capsys.readouterr().out
    assert adapter.parent.name not in {path.name for path in (here / "artefacts").iterdir()}
