"""A class as a file: the same bits in another run over the same base, and refused wherever it does not belong."""

import shutil

import pytest
import torch

from funlora_lab import open_folder, open_run, preset
from funlora_lab.__main__ import main
from funlora_lab.adapters import Adapters
from funlora_lab.continual import OpenRun, class_files
from funlora_lab.errors import LabError
from funlora_lab.store import Run, read_tensors, write_tensors
from funlora_lab.systems import meta_unet
from funlora_lab.training import Runtime

SMOKE = preset("smoke")
OTHER = SMOKE.but(adapter_images=48, score_after="none")  # over the same base


@pytest.fixture(scope="module")
def home(smoke_home, tmp_path_factory):
    return shutil.copytree(smoke_home, tmp_path_factory.mktemp("own") / "home")


@pytest.fixture(scope="module")
def exported(home):
    """Class 9 of a run, as a file, and the samples it has there."""
    run = open_run(SMOKE, "cpu", home=home)
    return run.export_class("9", home / "nine.safetensors"), run.samples(9)


def fresh(home, name: str) -> OpenRun:
    """A run of its own for one test, over the same base; its adapters were trained on fewer images."""
    folder = open_run(OTHER, "cpu", home=home).run.folder
    return open_folder(shutil.copytree(folder, home / name), "cpu")


def flip(file):
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)


def test_a_class_travels_to_another_run_over_the_same_base_bit_for_bit(home, exported):
    file, samples = exported
    run = fresh(home, "travels")
    assert not torch.equal(run.samples(9), samples)
    run.remove_class("9")
    assert run.import_class(file) == 9
    row, facts = read_tensors(file)
    for again in (run, open_folder(run.run.folder, "cpu")):
        assert again.known[9] == "9"
        assert torch.equal(again.samples(9), samples)
        other_row, other_facts = read_tensors(again.export_class(9, home / "again.safetensors"))
        assert other_facts == facts
        assert all(torch.equal(row[name], other_row[name]) for name in row.keys() | other_row.keys())


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
    assert run.samples(12).shape == (20, 1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"base_images": 32, "adapter_images": 16}, "another base"),
        ({"method": "shift"}, "method .funlora. instead of .shift."),
        ({"window": "12-23"}, "window .11-23. instead of .12-23."),
        ({"method": "fine-tune"}, "learns no class apart"),
        ({"method": "classifier-multitask"}, "learns no class apart"),
    ],
)
def test_a_file_of_another_base_or_method_is_refused(home, exported, changes, saying):
    run = OpenRun(Run.of(SMOKE.but(**changes), home), Runtime())  # its classes are learned when they are asked for
    with pytest.raises(LabError, match=saying) as refusal:
        run.import_class(exported[0])
    assert str(refusal.value).count(". ") == 0
    assert not run.run.folder.exists()


def test_a_file_that_does_not_belong_is_refused_in_one_sentence_and_changes_nothing(home, exported):
    file, _ = exported
    row, facts = read_tensors(file)
    bad, run = home / "bad.safetensors", fresh(home, "refused")

    def refused(saying: str, tensors=row, **changes):
        write_tensors(bad, tensors, {**facts, **changes})
        with pytest.raises(LabError, match=saying) as refusal:
            run.import_class(bad)
        assert str(refusal.value).count(". ") == 0
        assert not list(run.run.folder.glob("classes/*.safetensors"))

    refused("already knows class 9")
    run.remove_class(9)
    refused("no class file", kind="something else")
    refused("no class file", format=class_files.FORMAT + 1)
    refused("no class file", **{"class": "../9"})
    refused("no class file", **{"class": -1})
    refused("this run's data call 9", name="cat")
    refused("does not hold the numbers", dict(list(row.items())[1:]))
    refused("not finite", {name: value / 0 for name, value in row.items()})
    write_tensors(bad, row, facts)
    flip(bad)
    for content, saying in ((bad.read_bytes(), "checksum"), (file.read_bytes()[:-100], "damaged"), (b"", "damaged")):
        bad.write_bytes(content)
        with pytest.raises(LabError, match=saying):
            run.import_class(bad)
    with pytest.raises(LabError, match="There is no file"):
        run.import_class(home / "missing.safetensors")
    assert run.import_class(file) == 9


def test_a_class_of_the_base_cannot_be_exported_or_removed(home):
    run = open_run(SMOKE, "cpu", home=home)
    for act in (run.remove_class, lambda cls: run.export_class(cls, home / "no.safetensors")):
        with pytest.raises(LabError, match="learned with the base"):
            act("0")
    assert not (home / "no.safetensors").exists()


def test_an_imported_file_damaged_later_is_named_when_the_run_is_opened(home, exported):
    run = fresh(home, "damaged later")
    run.remove_class(9)
    run.import_class(exported[0])
    flip(class_files.file_of(run.run, 9, "safetensors"))
    with pytest.raises(LabError, match=r"classes/9\.safetensors is damaged"):
        open_folder(run.run.folder, "cpu").samples(9)


@pytest.mark.parametrize(("name", "numbers"), [("cifar10", 10_028), ("cifar100", 10_028)])
def test_a_class_at_cifar_size_is_a_file_of_about_40_kb(name, numbers):
    adapters = Adapters(meta_unet(preset(name)), preset(name))
    assert adapters.parameters_per_class == numbers
    size = len(class_files.content(adapters, adapters.neutral(), "0" * 64, 7, "horse"))
    assert 4 * numbers < size < 48_000


def test_the_commands_export_import_and_remove(home, monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", str(home))
    first, second = Run.of(SMOKE, home).folder.name, fresh(home, "commands").run.folder
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


def test_a_run_that_is_not_finished_cannot_be_opened(home, tmp_path):
    shutil.copy(Run.of(SMOKE, home).config_file, tmp_path)
    assert Run.at(tmp_path).experiment == SMOKE
    with pytest.raises(LabError, match="not finished"):
        open_folder(tmp_path)
    with pytest.raises(LabError, match="is no run: accepted is a run's folder or its name"):
        open_folder(tmp_path / "nosuch")
