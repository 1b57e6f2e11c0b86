"""A class as a file: the same bits in another run over the same base, and refused wherever it does not belong."""

import json
import shutil

import pytest
import torch

from funlora_lab import classfiles
from funlora_lab.__main__ import main
from funlora_lab.adapters import Adapters
from funlora_lab.disk import read_tensors, write_tensors
from funlora_lab.errors import LabError
from funlora_lab.network import build_unet
from funlora_lab.opened import OpenRun, open_folder, open_run
from funlora_lab.presets import PRESETS
from funlora_lab.store import Run

TINY = PRESETS["smoke"].but(split="8-2", base_images=64, classifier_epochs=1, samples_per_class=6, chunk=3)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def opened(home, **changes) -> OpenRun:
    return open_run(TINY.but(**changes), device="cpu", home=home)


@pytest.fixture(scope="module")
def exported(home):
    """Class 9 of a run, as a file, and the samples it has there."""
    run = opened(home)
    return run.export_class("9", home / "nine.safetensors"), run.samples(9)


def fresh(home, name: str) -> OpenRun:
    """A run of its own for one test, over the same base; its adapters trained on fewer images."""
    folder = opened(home, adapter_images=48).run.folder
    return open_folder(shutil.copytree(folder, home / name), "cpu")


def test_a_class_travels_to_another_run_over_the_same_base_bit_for_bit(home, exported):
    file, samples = exported
    run = fresh(home, "travels")
    own = run.samples(9)
    assert not torch.equal(own, samples)
    run.remove_class("9")
    assert run.import_class(file) == 9
    for again in (run, open_folder(run.run.folder, "cpu")):
        assert again.known[9] == "9"
        assert torch.equal(again.samples(9), samples)
    (row, facts), (first_row, first_facts) = (
        read_tensors(path) for path in (run.export_class(9, home / "again.safetensors"), file)
    )
    assert facts == first_facts
    assert all(torch.equal(row[name], first_row[name]) for name in row.keys() | first_row.keys())


def test_a_removed_class_is_gone_and_results_and_other_classes_stay(home):
    run = fresh(home, "removed")
    results, others = run.run.results_file.read_bytes(), {cls: run.samples(cls) for cls in (0, 8)}
    file = run.export_class(9, home / "kept.safetensors")
    before = run.samples(9)
    assert run.remove_class("9") == 9
    for again in (run, open_folder(run.run.folder, "cpu")):
        assert 9 not in again.known
        with pytest.raises(LabError, match="class=9: accepted are the classes of this run, 0, 1, 2, 3, 4, 5, 6, 7, 8"):
            again.samples(9)
        assert all(torch.equal(again.samples(cls), images) for cls, images in others.items())
    with pytest.raises(LabError, match="class=9"):
        run.remove_class("9")
    run.import_class(file)
    assert torch.equal(run.samples(9), before)
    run.remove_class("9")
    assert 9 not in open_folder(run.run.folder, "cpu").known
    assert run.run.results_file.read_bytes() == results


def test_a_class_the_data_do_not_have_can_be_brought_in(home, exported):
    row, facts = read_tensors(exported[0])
    new = home / "new.safetensors"
    write_tensors(new, row, {**facts, "class": 12, "name": "heart"})
    run = fresh(home, "brought in")
    assert run.import_class(new) == 12
    assert run.known[12] == "heart"
    assert run.class_of("heart") == 12
    assert run.samples(12).shape == (6, 1, 8, 8)


def test_a_file_that_does_not_belong_is_refused_in_one_sentence_and_changes_nothing(home, exported):
    file, _ = exported
    row, facts = read_tensors(file)
    bad = home / "bad.safetensors"
    run = fresh(home, "refused")

    def refused(by: OpenRun, saying: str, tensors=row, **changes):
        write_tensors(bad, tensors, {**facts, **changes})
        with pytest.raises(LabError, match=saying) as refusal:
            by.import_class(bad)
        assert str(refusal.value).count(". ") == 0
        assert not list((by.run.folder / "classes").glob("*.safetensors"))

    refused(run, "already knows class 9")
    run.remove_class(9)
    refused(opened(home, seed=1), "another base")
    refused(opened(home, method="shift"), "method .funlora. instead of .shift.")
    refused(opened(home, window="12-23"), "window .11-23. instead of .12-23.")
    refused(opened(home, method="fine-tune"), "learns no class apart")
    refused(run, "no class file", kind="something else")
    refused(run, "no class file", **{"class": "../9"})
    refused(run, "no class file", **{"class": -1})
    refused(run, "this run's data call 9", name="cat")
    refused(run, "does not hold the numbers", dict(list(row.items())[1:]))
    refused(run, "not finite", {name: value / 0 for name, value in row.items()})
    for content, saying in ((file.read_bytes()[:-100], "damaged"), (b"", "damaged"), (_flipped(file), "checksum")):
        bad.write_bytes(content)
        with pytest.raises(LabError, match=saying):
            run.import_class(bad)
    with pytest.raises(LabError, match="There is no file"):
        run.import_class(home / "missing.safetensors")
    assert run.import_class(file) == 9


def _flipped(file) -> bytes:
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    return bytes(content)


def test_a_class_of_the_base_cannot_be_exported_or_removed(home):
    run = opened(home)
    for act in (run.remove_class, lambda cls: run.export_class(cls, home / "no.safetensors")):
        with pytest.raises(LabError, match="learned with the base"):
            act("0")
    assert not (home / "no.safetensors").exists()


def test_an_imported_file_damaged_later_is_named_when_the_run_is_opened(home, exported):
    run = fresh(home, "damaged later")
    run.remove_class(9)
    run.import_class(exported[0])
    file = classfiles.imported_file(run.run, 9)
    file.write_bytes(_flipped(file))
    with pytest.raises(LabError, match=r"classes/9\.safetensors is damaged"):
        open_folder(run.run.folder, "cpu").samples(9)


@pytest.mark.parametrize(("preset", "numbers"), [("cifar10", 10_028), ("cifar100", 10_028)])
def test_a_class_at_cifar_size_is_a_file_of_about_40_kb(preset, numbers):
    with torch.device("meta"):
        net = build_unet(PRESETS[preset], 2)
    adapters = Adapters(net, PRESETS[preset])
    assert adapters.parameters_per_class == numbers
    size = len(classfiles.content(adapters, adapters.neutral(), "0" * 64, 7, "horse"))
    assert 4 * numbers < size < 48_000


def test_the_commands_export_import_and_remove(home, monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", str(home))
    first, second = opened(home).run.folder.name, fresh(home, "commands").run.folder
    monkeypatch.chdir(home)
    assert main(["export", first, "--class", "8"]) == 0
    assert "class-8.safetensors" in capsys.readouterr().out
    assert main(["import", str(second), "class-8.safetensors"]) == 2
    assert "already knows class 8" in capsys.readouterr().err
    assert main(["remove", str(second), "--class", "8"]) == 0
    assert main(["import", str(second), "class-8.safetensors"]) == 0
    assert main(["export", first, "--class", "nosuch"]) == 2
    assert main(["export", "nosuch", "--class", "8"]) == 2
    assert "is no run" in capsys.readouterr().err


def test_a_folder_that_is_no_run_of_this_version_is_refused(tmp_path, home):
    for word in (tmp_path, "nosuch", tmp_path / "nosuch"):
        with pytest.raises(LabError, match="is no run: accepted is a run's folder or its name"):
            Run.at(word)
    config = json.loads((opened(home).run.folder / "config.json").read_text())
    path = tmp_path / "config.json"

    def refused(content: str, saying: str):
        path.write_text(content)
        with pytest.raises(LabError, match=saying):
            Run.at(tmp_path)

    refused("{", "damaged")
    refused("[]", "damaged")
    newer = config | {"experiment": config["experiment"] | {"later": 1}}
    refused(json.dumps(newer), r"another version .*\(settings that this one lacks: later\)")
    bad = config | {"experiment": config["experiment"] | {"seed": -1}}
    refused(json.dumps(bad), "seed=-1")
    refused(json.dumps(config | {"experiment": config["experiment"] | {"seed": "x"}}), "wrong kind")
    path.write_text(json.dumps(config))
    assert Run.at(tmp_path).experiment == TINY
    with pytest.raises(LabError, match="not finished"):
        open_folder(tmp_path)
