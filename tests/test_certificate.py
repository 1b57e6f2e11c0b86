"""A run's certificates prove that nothing was forgotten, and one flipped bit is found and named."""

import json
import shutil

import pytest
import torch
from fault_harness import EXPERIMENT

from funlora_lab import continual
from funlora_lab.__main__ import main
from funlora_lab.continual import certificate
from funlora_lab.data import SOURCES, DataSource
from funlora_lab.errors import LabError
from funlora_lab.store import Run, read_tensors, write_tensors
from funlora_lab.store import home as default_home
from funlora_lab.studies import verification
from funlora_lab.studies.verification import verify
from funlora_lab.training import Runtime

NEW = 9  # a class learned by an adapter


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("finished")
    for method in ("funlora", "fine-tune"):
        continual.run(EXPERIMENT.but(method=method), home=home)
    return home


@pytest.fixture
def home(finished, tmp_path):
    """A copy of the finished runs, in another place than FUNLORA_HOME."""
    return shutil.copytree(finished, tmp_path / "own home")


def stored_run(home, method="funlora"):
    return Run.of(EXPERIMENT.but(method=method), home)


def file_of(home, what):
    """The stored result of the run's ``backbone``, or of the ``adapter`` or ``samples`` of the class NEW."""
    last = verification.certificates(stored_run(home))[-1]
    entry = last["backbone"] if what == "backbone" else last["classes"][str(NEW)][what]
    name = "chunk-00000.safetensors" if what == "samples" else "result.safetensors"
    return home / "artefacts" / entry["file"] / name


def flip_a_bit(tensor):
    """The same tensor with the lowest bit of its first number flipped."""
    flipped = tensor.clone()
    flipped.view(-1).view(torch.uint8)[0] ^= 1
    return flipped


def everything(home):
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_nothing_changes_with_a_frozen_base(home):
    report = verify(stored_run(home))
    assert report.unchanged
    assert not report.differences
    table = report.table()
    assert list(table.columns) == ["task 1", "task 2"]
    assert (table.loc["class 0"] == "unchanged").all()
    assert (table.loc[f"class {NEW}"] == ["", "unchanged"]).all()


def test_verifying_writes_and_deletes_nothing_and_the_command_succeeds(home, capsys):
    for what in ("adapter", "backbone"):  # as a run leaves it that dies just after it finished an artefact
        shutil.copy(file_of(home, what), file_of(home, what).with_name("state.safetensors"))
        file_of(home, what).with_name(".result.safetensors.1.tmp").touch()
    before = everything(home)
    assert main(["verify", str(stored_run(home).folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unchanged"] is True
    assert found["differences"] == []
    assert found["compared"] > 50
    assert everything(home) == before


def test_verifying_looks_for_the_images_beside_the_run_and_never_in_the_default_home(home, monkeypatch):
    caches = []

    def images(experiment, cache):
        caches.append(cache)
        return SOURCES["digits"].read(experiment, cache)

    monkeypatch.setitem(SOURCES, "stored", DataSource("stored", "digits that tell where they are read", images))
    experiment = EXPERIMENT.but(data="stored")
    continual.run(experiment, home=home)
    report = verify(Run.of(experiment, home))
    assert report.unchanged
    assert not report.notes
    assert caches == [home / "images"], "verifying needs no images"
    assert len(continual.OpenRun(Run.of(experiment, home), Runtime()).context.dataset.test) == 360
    assert caches == [home / "images"] * 2
    assert not default_home().exists()


@pytest.mark.parametrize("what", ["adapter", "backbone"])
def test_a_flipped_bit_with_a_consistent_checksum_is_named_by_class_and_layer(home, what, capsys):
    path = file_of(home, what)
    tensors, facts = read_tensors(path)
    name = sorted(tensors)[3]
    write_tensors(path, tensors | {name: flip_a_bit(tensors[name])}, facts)
    read_tensors(path)  # the file itself is beyond suspicion
    assert main(["verify", str(stored_run(home).folder)]) == 1
    printed = capsys.readouterr().out
    assert (f"class {NEW}, its adapter" if what == "adapter" else "the backbone") in printed
    layer = name.rpartition("/" if "/" in name else ".")[0]
    report = verify(stored_run(home))
    stored = [row for row in report.differences if row["against"] == "what is stored now" and row["what"] == what]
    assert stored
    assert all(row["layers"] == [layer] for row in stored)
    touched = {row["class"] for row in report.differences}
    assert touched == ({str(NEW)} if what == "adapter" else {None, *touched})


@pytest.mark.parametrize("what", ["adapter", "backbone", "samples"])
def test_a_bit_flipped_on_the_disk_is_named_and_the_file_never_loaded(home, what, capsys):
    path = file_of(home, what)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(stored_run(home).folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["unchanged"] is False
    rows = [row for row in found["differences"] if row["what"] == what]
    assert rows
    assert {row["class"] for row in rows} == {None if what == "backbone" else str(NEW)}
    assert all("checksum" in row["why"] for row in rows)
    assert all(len(row["layers"]) == (0 if what == "samples" else 1) for row in rows)
    with pytest.raises(LabError, match="damaged"):
        read_tensors(path)


def test_a_missing_artefact_is_named_and_not_trained_again(home):
    path = file_of(home, "adapter")
    path.unlink()
    before = everything(home)
    report = verify(stored_run(home))
    assert [row["class"] for row in report.differences] == [str(NEW)]
    assert everything(home) == before


def test_fine_tuning_honestly_shows_what_it_forgot(home):
    report = verify(stored_run(home, "fine-tune"))
    assert not report.unchanged
    changed = {(row["class"], row["what"]) for row in report.differences}
    assert (None, "backbone") in changed
    assert ("0", "images") in changed
    assert {row["against"] for row in report.differences} == {"what it was when first learned"}  # nothing since then
    assert any("the backbone: differs" in sentence for sentence in report.sentences())


def test_on_another_machine_images_are_compared_within_the_tolerance(home, monkeypatch):
    monkeypatch.setattr(certificate, "machine_of", lambda device: "another machine")
    drawn = certificate.draw_few
    monkeypatch.setattr(certificate, "draw_few", lambda *words: drawn(*words) + 1e-5)
    report = verify(stored_run(home))
    assert report.unchanged
    assert "another machine" in report.notes[0]
    monkeypatch.setattr(certificate, "draw_few", lambda *words: drawn(*words) + 0.1)
    assert not verify(stored_run(home)).unchanged


def test_without_certificates_there_is_nothing_to_verify(tmp_path, capsys):
    experiment = EXPERIMENT.but(method="classifier-multitask")
    continual.run(experiment, home=tmp_path)
    assert main(["verify", str(Run.of(experiment, tmp_path).folder)]) == 2
    assert "no certificates" in capsys.readouterr().err
