"""What people of this trade report of such tools, by kind of fault: the reported case and others of its kind."""

import base64
import io
import json
import os
import re
import shutil
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from funlora_lab import LabError, continual, data, open_folder, open_run, preset, store, verify
from funlora_lab.__main__ import main
from funlora_lab.continual import OpenRun, class_files
from funlora_lab.data import SOURCES, Images, pictures
from funlora_lab.errors import Stopped, memory_for
from funlora_lab.presets import check_parameters, configured
from funlora_lab.store import Run, fingerprint, read_tensors
from funlora_lab.studies import budget, keep, learned, notebooks, plots, quality
from funlora_lab.systems import build_unet
from funlora_lab.training import Runtime
from funlora_lab.workbench import layers, markup, report

TINY = preset("smoke").but(
    split="1-1", multipliers=(1,), window="4-7", base_images=32, adapter_images=16, samples_per_class=8, chunk=8,
    classifier_epochs=1,
)  # fmt: skip


def save(path: Path, seed: int = 0, size=(12, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make(root: Path, *classes: str, suffix="png", seed=0) -> Path:
    """A labelled folder of two pictures a class and part; another seed makes other pictures of the same size."""
    for part in ("train", "test"):
        for c, name in enumerate(classes):
            for i in range(2):
                save(root / part / name / f"{i}.{suffix}", [seed, c, i, part == "test"])
    return root


def of(root: Path, **changes):
    return TINY.but(data="folder", data_root=str(root), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder that holds pictures and the home of a finished run of them."""
    root = tmp_path_factory.mktemp("finished")
    open_run(of(make(root / "pictures", "a", "b", "c")), "cpu", home=root / "home")
    return root


@pytest.fixture
def mine(finished, tmp_path):
    """The same, to be changed: (its pictures are gone, the finished run opened in its home)."""
    home = shutil.copytree(finished / "home", tmp_path / "own home")
    return Run(home / Run.of(of(finished / "pictures")).folder.name, of(finished / "pictures"))


# --- places -----------------------------------------------------------------------------------------------------------


def test_every_place_is_meant_from_the_folder_of_the_command_and_a_tilde_is_the_home(tmp_path, monkeypatch, finished):
    here, user = tmp_path / "here", tmp_path / "user"
    here.mkdir(), user.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(user))
    words = "settings=data=folder data_root=imgs pretrain_root='my pics' split=1-1"
    (path,) = notebooks.folder().glob("07_*")
    given = notebooks.assign([path], "smoke", [words, "inception=~/weights.pth"])[path]
    e = configured("smoke", given["settings"])
    assert (e.data_root, e.pretrain_root) == (str(here / "imgs"), str(here / "my pics"))
    assert given["inception"] == str(user / "weights.pth")
    for name in ("HOME", "FIGURES", "DATA"):
        monkeypatch.setenv(f"FUNLORA_{name}", f"~/{name}")
    with notebooks.environment() as variables:
        assert [variables[f"FUNLORA_{name}"] for name in ("HOME", "FIGURES", "DATA")] == [
            str(user / name) for name in ("HOME", "FIGURES", "DATA")
        ]
    monkeypatch.delenv("FUNLORA_DATA")
    with notebooks.environment() as variables:
        assert variables["FUNLORA_DATA"] == str(here / "data")
    assert store.home() == user / "HOME"
    assert keep.folder(preset("smoke")) == user / "FIGURES" / "smoke"
    assert preset("smoke").but(base_weights="~/w.pt").base_weights == str(user / "w.pt")
    assert Run.of(of("imgs")).folder == Run.of(of(here / "imgs")).folder
    shutil.copytree(finished / "home", user / "HOME")
    name = Run.of(of(finished / "pictures")).folder.name
    assert main(["export", name, "--class", "b", "--to", "~/b.safetensors"]) == 0
    assert main(["remove", f"~/HOME/{name}", "--class", "b"]) == 0
    assert main(["import", name, "~/b.safetensors"]) == 0
    with pytest.raises(LabError, match="~nobody-here"):
        preset("smoke").but(data_root="~nobody-here/x")


# --- data are known by their content ----------------------------------------------------------------------------------


def test_other_content_never_yields_old_numbers(tmp_path, monkeypatch):
    root, more, weights = tmp_path / "pictures", tmp_path / "more", tmp_path / "base.safetensors"
    make(root, "a", "b", suffix="bmp")
    save(more / "deep" / "0.bmp")
    safetensors.torch.save_file(build_unet(TINY, 1).state_dict(), weights)
    plain = of(root, score_after="last")
    first = open_run(plain, "cpu", home=tmp_path / "home").results

    def again(experiment, word):
        with pytest.raises(LabError, match=f"{word}.* changed since this run was made") as refusal:
            open_run(experiment, "cpu", home=tmp_path / "home")
        assert str(refusal.value).count(". ") == 0

    pretrained = plain.but(pretrain_root=str(more))
    based = plain.but(base_weights=str(weights), base_images=0)
    for experiment in (pretrained, based):
        open_run(experiment, "cpu", home=tmp_path / "home")
    picture = root / "train" / "a" / "0.bmp"
    before, bytes_before = picture.stat(), picture.read_bytes()
    save(picture, 99)
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (picture.stat().st_size, picture.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again(plain, "images of .*pictures")
    picture.write_bytes(bytes_before)
    assert open_run(plain, "cpu", home=tmp_path / "home").results == first, "the same pictures are the same data"
    save(more / "deep" / "0.bmp", 5)
    again(pretrained, "pretrain_root")
    safetensors.torch.save_file(build_unet(TINY.but(seed=7), 1).state_dict(), weights)
    again(based, "base_weights")
    root.rename(tmp_path / "away")
    assert open_run(plain, "cpu", home=tmp_path / "home").results == first, "results outlive the pictures"

    monkeypatch.setitem(SOURCES, "drawn", None)
    shade = 10

    @data.data_source("drawn", "squares")
    def drawn(experiment, cache):
        pixels = torch.full((4, 1, 8, 8), shade, dtype=torch.uint8)
        return ("x", "y"), Images(pixels, torch.arange(4) % 2), Images(pixels, torch.arange(4) % 2)

    source = TINY.but(data="drawn", score_after="last")
    open_run(source, "cpu", home=tmp_path / "home")
    shade = 20
    again(source, "data=drawn")


# --- stored runs are read alone ---------------------------------------------------------------------------------------


def test_a_run_is_verified_exported_drawn_and_reported_without_its_pictures(
    mine, finished, tmp_path, monkeypatch, capsys
):
    shutil.rmtree(mine.folder.parent / "images")
    moved, numbers = tmp_path / "moved", {p: p.read_bytes() for p in mine.folder.parent.glob("artefacts/[an]*/*.safe*")}
    (finished / "pictures").rename(moved)
    try:
        for state in ("gone", "others"):
            found = verify(mine)
            assert (found.unchanged, found.notes, len(found.differences)) == (True, [], 0)
            assert {row["against"] for row in found.compared} > {"what is stored now", "what is drawn now"}
            assert not (mine.folder.parent / "images").exists(), "verifying reads no pictures and keeps none"
            run = open_folder(mine.folder, "cpu")
            assert run.export_class("b", tmp_path / f"{state}.safetensors").stat().st_size > 1000
            assert run.samples(run.class_of("c")).shape == (8, 1, 8, 8)
            page = report.write(run, tmp_path / "page.html").read_text()
            assert "nothing changed" in page
            with pytest.raises(LabError, match="There is no folder" if state == "gone" else "have changed since"):
                quality.classifier_quality(run, 2)
            assert ("There is no folder" if state == "gone" else "have changed since") in page
            make(finished / "pictures", "a", "b", "c", seed=1)
    finally:
        shutil.rmtree(finished / "pictures")
        moved.rename(finished / "pictures")
    assert {p: p.read_bytes() for p in mine.folder.parent.glob("artefacts/[an]*/*.safe*")} == numbers, (
        "nothing is trained"
    )


def test_reading_never_needs_a_removed_class_and_removal_can_be_undone(smoke_run, capsys):
    run, results = smoke_run, smoke_run.results
    before = run.samples(9)
    assert main(["remove", str(run.run.folder), "--class", "9"]) == 0
    undo = capsys.readouterr().out.splitlines()[-1].split()
    run = open_folder(run.run.folder, "cpu")
    assert run.order == list(range(9))
    table = quality.classifier_quality(run, 2)
    assert set(table["group"]) == {"all", "task 1", "task 2", "task 3", *(f"class {c}" for c in range(9))}
    assert set(keep.pictures(run)) == {"samples", "losses", "accuracy", "confusion"}
    assert 0 <= budget.score(run, samples_per_class=4, classifier_epochs=1)["LA"] <= 1
    assert set(learned._each([run]).__next__()[0]) == {"seed", "class", "layer"}
    assert {about["class"] for about, *_ in learned._each([run])} == {"6", "7", "8"}
    assert layers.AdaptedLayers(run).values("rank of F").index.tolist() == ["6", "7", "8"]
    assert run.results["LA"] == results["LA"]
    assert main(undo[1:]) == 0
    assert torch.equal(open_folder(run.run.folder, "cpu").samples(9), before)


# --- classes of one's own ---------------------------------------------------------------------------------------------


def test_classes_of_ones_own_are_their_name_and_numbers_and_live_beside_each_other(smoke_run):
    generator, few = torch.Generator().manual_seed(0), {"samples_per_class": 4, "chunk": 4, "classifier_epochs": 1}
    shapes = {
        name: torch.randint(0, 255, (6, 1, 8, 8), dtype=torch.uint8, generator=generator) for name in ("star", "moon")
    }

    def learn(name, shape=None):
        return continual.learn(smoke_run, name, shapes[shape or name], adapter_images=16, **few)

    star, moon = learn("star"), learn("moon")
    files = [each.export() for each in (star, moon)]
    other_star = learn("star", "moon").export()
    assert len({*files, other_star}) == 3, "no file of one class lies on that of another"
    assert [smoke_run.import_class(file) for file in files] == [10, 11]
    assert [smoke_run.known[cls] for cls in (10, 11)] == ["star", "moon"]
    for file in (files[0], other_star):
        with pytest.raises(LabError, match=r"already knows class 10 \(star\)"):
            smoke_run.import_class(file)
    assert main(["import", str(smoke_run.run.folder), str(files[1])]) == 2
    again, sun = learn("moon"), learn("sun", "star")
    assert (again.cls, sun.cls) == (11, 12)
    assert {10, 11, 12} <= sun.generator.rows.keys(), "learning one drops no other"
    assert fingerprint(again.generator.rows[11]) == fingerprint(moon.generator.rows[moon.cls]), "whatever the index"
    assert set(sun.after) == {*smoke_run.classes, "sun"}
    smoke_run.remove_class("star")
    assert 10 not in smoke_run.known
    assert learn("sun", "star").cls == 12, "an index is not given to another"
    assert smoke_run.import_class(smoke_run.removed_file(10)) == 10
    opened = open_folder(smoke_run.run.folder, "cpu")
    assert (opened.class_of("star"), opened.class_of("moon"), opened.samples(11).shape[0]) == (10, 11, 20)
    content = class_files.content(opened.adapters, opened.row(9), fingerprint(opened.network.state_dict()), 0, "0")
    files[0].write_bytes(content)
    with pytest.raises(LabError, match=r"class 0 \(0\); its base was trained on it"):  # nothing can take it out
        opened.import_class(files[0])


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_whole_or_refused_by_name(tmp_path):
    root = make(tmp_path / "d", "a", "b", "c", "d")
    whole = data.load(of(root), tmp_path / "cache")
    for part in ("train", "test"):  # a dead link
        shutil.rmtree(root / part / "d")
        (root / part / "d").symlink_to("/mnt/none")
    with pytest.raises(LabError, match="train/d is a link to /mnt/none, which is not there"):
        data.load(of(root), tmp_path / "cache")
    for part in ("train", "test"):  # a live one
        (root / part / "d").unlink()
        (root / part / "d").symlink_to(root / part / "a")
    assert data.load(of(root), tmp_path / "cache").classes == whole.classes
    (root / "train" / "a" / "dead.png").symlink_to("nowhere.png")
    for read in (lambda: data.load(of(root), tmp_path), lambda: continual.images_in(root / "train" / "a", 8, 1)):
        with pytest.raises(LabError, match=r"dead\.png is a link to nowhere\.png"):
            read()
    with pytest.raises(LabError, match=r"dead\.png is a link"):
        pictures.unlabelled(root / "train", 8, 1, tmp_path / "cache")


def test_links_that_lead_upwards_hidden_files_and_what_systems_leave_count_nowhere(tmp_path):
    root, other = make(tmp_path / "l", "a", "b"), make(tmp_path / "m", "a")
    (root / "train" / "a" / "loop").symlink_to(root / "train" / "a")
    (root / "up").symlink_to(other)
    (other / "up").symlink_to(tmp_path / "l")
    assert len(pictures.unlabelled(root / "train" / "a", 8, 3, tmp_path / "cache")) == 2
    assert len(pictures.unlabelled(root, 8, 3, tmp_path / "cache")) == 8 + 4
    (root / "train" / "a" / "loop").unlink()
    (root / "up").unlink()
    clean = data.load(of(root), tmp_path / "cache")
    for name in (".ipynb_checkpoints/0.png", "@eaDir/0.png", "__MACOSX/0.png", "$RECYCLE.BIN/0.png"):
        for folder in (root, root / "train", root / "train" / "a"):
            save(folder / name)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", "Icon\r"):
        for folder in (root, root / "train", root / "train" / "a"):
            (folder / name).write_text("x")
    for name in ("film.mpg", "paper.pdf", "drawing.eps"):  # no pictures that Pillow reads by itself
        (root / "train" / name).write_text("%PDF")
    assert data.load(of(root), tmp_path / "cache").fingerprint == clean.fingerprint
    assert len(pictures.unlabelled(root / "train", 8, 3, tmp_path / "cache")) == 4
    assert len(continual.images_in(root / "train" / "a", 8, 3)) == 2


def test_all_bad_pictures_are_named_at_once_and_no_advice_is_to_delete(tmp_path):
    root = make(tmp_path / "d", "a", "b")
    for part, i in (("train", 1), ("train", 2), ("train", 3), ("test", 4), ("test", 5)):
        (root / part / "a" / f"z{i}.png").touch()
    said = r"5 of 13 pictures cannot be read: .*z1\.png, .*z2\.png, .*z3\.png, .*z4\.png and 1 more; mend"
    with pytest.raises(LabError, match=said) as refusal:
        data.load(of(root), tmp_path / "cache")
    assert "\n" not in str(refusal.value)
    assert not {"delete", "remove"} & set(str(refusal.value).split())
    with pytest.raises(LabError, match="3 of 5 pictures"):
        continual.images_in(root / "train" / "a", 8, 1)
    with pytest.raises(LabError, match="5 of 13 pictures"):
        pictures.unlabelled(root, 8, 1, tmp_path / "cache")


def test_names_that_look_alike_are_alike(tmp_path, smoke_run):
    root = make(tmp_path / "e", "a", "b")
    (root / "train" / "a").rename(root / "train" / "\u00e9")
    (root / "test" / "a").rename(root / "test" / "e\u0301")
    assert data.load(of(root), tmp_path / "cache").classes == ("b", "\u00e9")
    file = smoke_run.export_class(9, tmp_path / "nine.safetensors")
    row, facts = read_tensors(file)
    store.write_tensors(file, row, facts | {"class": 12, "name": "e\u0301"})
    assert smoke_run.import_class(file) == smoke_run.class_of("\u00e9") == smoke_run.class_of("e\u0301") == 12
    assert smoke_run.free_index("\u00e9") == 12


def test_a_long_reading_stops_when_asked(tmp_path):
    root, asked = make(tmp_path / "d", "a", "b"), iter([None] * 6)
    runtime = Runtime(stop=lambda: next(asked, "Asked to stop; everything is saved."))
    with pytest.raises(Stopped, match="Asked to stop"):
        continual.run(of(root), runtime=runtime, home=tmp_path / "home")
    assert not list((tmp_path / "home" / "images").glob("*.safetensors"))
    assert not list((tmp_path / "home").glob("smoke-*"))

    def stopped():
        raise Stopped("Stopped.")

    for read in (
        lambda: pictures.unlabelled(root, 8, 1, tmp_path / "cache", stopped),
        lambda: continual.images_in(root / "train" / "a", 8, 1, stopped),
        lambda: data.load(of(root), tmp_path / "cache", stopped),
    ):
        with pytest.raises(Stopped):
            read()


def test_what_was_read_before_is_read_still(tmp_path):
    frames = [Image.new("L", (8, 8), shade) for shade in (40, 200)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    assert data.read_picture(tmp_path / "moves.gif", 8, 1).unique().tolist() == [40]
    for mode, kind in (("CMYK", "jpg"), ("P", "png"), ("1", "png"), ("LA", "png")):
        Image.new("RGB", (9, 8), (250, 250, 250)).convert(mode).save(tmp_path / f"{mode}.{kind}")
        assert data.read_picture(tmp_path / f"{mode}.{kind}", 8, 3).float().mean() > 240
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    (tmp_path / "empty.png").touch()
    shutil.copy(tmp_path / "P.png", tmp_path / "no ending")
    assert data.read_picture(tmp_path / "no ending", 8, 3).shape == (3, 8, 8)
    for name in ("bomb.png", "empty.png"):
        with pytest.raises(LabError, match=name):
            data.read_picture(tmp_path / name, 8, 1)


# --- outputs are named by what made them ------------------------------------------------------------------------------


def test_outputs_of_other_parameters_or_data_lie_elsewhere(tmp_path, monkeypatch):
    names = [
        notebooks.copies("smoke", words)
        for words in ([], ["seed=1"], ["seed=2"], ["settings=a=1 b"], ["settings=a=1_b"])
    ]
    assert len(set(names)) == 5
    assert names[0].name == "smoke-notebooks"
    assert names[1].name.startswith("smoke-notebooks-seed_1-")
    assert notebooks.copies("smoke", ["a=1", "b=2"]) == notebooks.copies("smoke", ["b=2", "a=1"])
    digits, own = preset("digits"), preset("digits").but(data="folder", data_root=str(tmp_path / "a"))
    assert keep.folder_name(digits.but(seed=3, method="shift")) == "digits"
    assert keep.folder_name(preset("cifar10").but(data_root=str(tmp_path))) == "cifar10"
    others = [own, own.but(data_root=str(tmp_path / "b")), digits.but(data="cifar10", image_size=8, channels=1)]
    others += [own.but(data_root="")]
    folders = {keep.folder_name(e) for e in others}
    monkeypatch.setenv("FUNLORA_DATA", str(tmp_path / "c"))
    folders.add(keep.folder_name(own.but(data_root="")))
    assert len(folders) == 5
    assert not folders & {path.name for path in (store.checkout() / "figures").iterdir()}


# --- one bad stored file stops nobody who asks for others -------------------------------------------------------------


def test_one_bad_file_stops_no_reader_of_others(smoke_run, monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", str(smoke_run.run.folder.parent))
    good = smoke_run.run.folder
    for i, content in enumerate(("{", "[]", '{"event": "result", "LA": "x"}', '{"event": "result"}')):
        bad = shutil.copytree(good, good.with_name(f"bad-{i}"))
        (bad / "results.json").write_text(content)
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith("bad-")] == ["damaged"] * 4
    assert f"{good.name}  LA " in said
    file = smoke_run.export_class(9, good.parent / "nine.safetensors")
    smoke_run.remove_class(9)
    smoke_run.import_class(file)
    class_files.file_of(smoke_run.run, 9, "safetensors").write_text("torn")
    (good / "classes" / "12.safetensors").write_text("torn")
    run = OpenRun(smoke_run.run, Runtime())
    assert run.samples(8).shape == (20, 1, 8, 8)
    with pytest.raises(LabError, match=r"9\.safetensors is damaged"):
        run.samples(9)
    assert run.import_class(file) == 9, "a good file takes its place"
    assert 9 in run.known


# --- notebooks --------------------------------------------------------------------------------------------------------


def test_a_kernel_is_of_this_interpreter_and_papermill_s_failures_are_sentences(tmp_path, monkeypatch):
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_code_cell("preset: str = 'smoke'\nsettings: str = ''", metadata={"tags": ["parameters"]})
    ]
    book.cells += [
        nbformat.v4.new_code_cell("import os, sys\nprint(sys.executable, settings, os.environ['FUNLORA_HOME'])")
    ]
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder, home = tmp_path / "note{s}", tmp_path / "h {x} é"
    folder.mkdir()
    nbformat.write(book, folder / "00_a.ipynb")
    monkeypatch.setattr(notebooks, "folder", lambda: folder)
    strange = tmp_path / "jupyter" / "kernels" / "python3"
    strange.mkdir(parents=True)
    kernel = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (strange / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("FUNLORA_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (copy,) = notebooks.execute("smoke", ["settings=data_root='my pics' seed=2"])
    said = nbformat.read(copy, as_version=4).cells[-1].outputs[0].text
    assert said.split("\n")[0] == f"{sys.executable} 'data_root={tmp_path}/my pics' seed=2 {home}"
    with pytest.raises(LabError, match=r"^seed=-1: accepted is a whole number from 0 up"):
        notebooks.execute("smoke", ["settings=seed=-1"])
    (folder / "00_a.ipynb").write_text("{")
    with pytest.raises(LabError, match="00_a"):
        notebooks.execute("smoke", [])


PARAMETERS = {"preset": str, "seed": int, "seeds": int, "settings": str, "device": str, "tolerance": float}
GOOD = {"preset": "smoke", "seed": 0, "seeds": 1, "settings": "", "device": "cpu", "tolerance": 1e-5}


def test_notebooks_accept_lists_and_say_what_else_they_accept():
    check_parameters(GOOD | {"__annotations__": PARAMETERS})
    check_parameters(GOOD | {"settings": ["functions=3", "seed=2"], "tolerance": 1, "__annotations__": PARAMETERS})
    assert configured("smoke", ["functions=3", "seed=2"]).functions == 3
    bad = {"settings": (None, 3, [1], "a='"), "device": (None, 0), "seed": ("x", -1, 1.0, True), "seeds": (0, None)}
    bad |= {"preset": (None, ["smoke"], "smoek"), "tolerance": (0, "x", None)}
    for name, values in bad.items():
        for value in values:
            with pytest.raises(LabError, match=f"{name}.*accepted") as refusal:
                check_parameters(GOOD | {name: value, "__annotations__": PARAMETERS})
            assert "\n" not in str(refusal.value)
    for path in notebooks.folder().glob("*.ipynb"):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert "\ncheck_parameters(globals())\n" in cells[1], path
    with pytest.raises(LabError, match="seeds=0: accepted is a whole number above 0"):
        notebooks.assign(list(notebooks.folder().glob("02_*")), "smoke", ["seeds=0"])


# --- names are text, pictures have bounds -----------------------------------------------------------------------------


def size_of(drawing: plots.Drawing) -> tuple[int, int]:
    return Image.open(io.BytesIO(drawing.png())).size


def test_names_are_text_and_pictures_readable_and_bounded(monkeypatch):
    names = ["n01440764 tench, Tinca tinca", "n01443537 goldfish, Carassius auratus", "$^$", "_a <b>_{x}"]
    images = {i: torch.randint(0, 255, (4, 1, 8, 8), dtype=torch.uint8) for i in range(4)}
    curve = {name: ([1, 2], [i, 1]) for i, name in enumerate(names)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        columns = plots.sample_columns([("real", images), ("samples", images)], range(4), names)
        assert size_of(columns)[0] > 110 * (8 * 0.34 + 2), "names take no room from the images"
        confusion, two = plots.confusion(np.eye(4), names), plots.confusion(np.eye(2), names[1:3])
        curves, front = plots.training_curves(curve, "$title"), plots.accuracy_per_task({"": {"$^$ and $_$": [1, 0.5]}})
        table = {"$^$": np.nan, "fine": 1.0}
        dots = plots.dots(plots.pd.DataFrame({"LA": table, "LA sd": table}), {"LA": "LA"})
        for drawing in (confusion, two, curves, front, dots):
            drawing.draw_without_rendering()
    for axis in (columns.axes[0], confusion.axes[0]):
        shown = [label.get_text() for label in axis.get_yticklabels()]
        assert (shown[0], shown[2]) == (names[0], "$^$")
        assert "goldfish" in shown[1] or "goldfi" in shown[1]
        assert len(shown[1]) <= plots.LETTERS
    assert len(curves.legends[0].get_texts()) == 4, "a name that begins with a line is in the legend"
    extents = [label.get_window_extent() for label in columns.axes[0].get_yticklabels()]
    assert all(not one.overlaps(other) for one, other in pairwise(extents))
    many = 400
    for drawing in (
        plots.confusion(np.eye(many), list(map(str, range(many)))),
        plots.sample_columns([("real", {i: images[0] for i in range(500)})], range(500), list(map(str, range(500)))),
        plots.dots(plots.pd.DataFrame({"LA": np.ones(500)}), {"LA": "LA"}),
    ):
        drawing.draw_without_rendering()
        width, height = drawing.get_size_inches() * drawing.dpi
        assert width * height <= 20e6
        spots = [label.get_window_extent() for label in drawing.axes[0].get_yticklabels() if label.get_text()]
        assert len(spots) > 50
        assert not any(one.overlaps(other) for one, other in pairwise(spots))
    assert np.prod(size_of(plots.confusion(np.eye(60), list(map(str, range(60)))))) <= 20e6
    long = plots.training_curves({str(i): ([1, 2], [i, 1]) for i in range(200)}, "many")
    texts = [text.get_text() for text in long.legends[0].get_texts()]
    assert texts[-1].endswith("more")
    assert "tex2jax_ignore" in str(markup.Markup("$^$"))
    assert r"a\|b" in keep.markdown(plots.pd.DataFrame({"x": ["a|b"]}), "caption")


def test_what_a_notebook_shows_is_a_png_with_words_too(smoke_run):
    adapted = layers.AdaptedLayers(smoke_run)
    shown = layers.unet_picture(layers.unet_layers(TINY), {4: 0.1, 5: 0.2}, "change of the weights")
    for drawn, words in (
        (layers.function_picture(adapted.view(9, min(adapted.names))), "rank"),
        (shown, "change"),
    ):
        alone = re.search(
            r'<img alt="([^"]*)" style="background-color:#fff" src="data:image/svg[^,]*,([^"]*)">', str(drawn)
        )
        assert words in alone[1]
        picture = ElementTree.fromstring(base64.b64decode(alone[2]))
        assert float(picture.get("width")) > 300
        assert len(list(picture)) > 10
    _, about = plots.training_curves({"7": ([1], [2])}, "Adapters")._repr_png_()
    assert about["alt"] == "Adapters; images seen; flow-matching loss"
    for path in notebooks.folder().glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                assert "<svg" not in "".join(output.get("data", {}).get("text/html", "")), path


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_stranger_s_file_is_refused_with_what_is_accepted_and_no_advice_to_delete_it(smoke_run, tmp_path):
    file = smoke_run.export_class(8, tmp_path / "8.safetensors")
    smoke_run.remove_class(8)
    with safetensors.safe_open(file, "pt") as opened:
        tensors, facts = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
    for name, value in (("format", "pt"), ("name", "{"), ("more", "[" * 100_000)):
        odd = {key: word for key, word in facts.items() if key != "sha256"} | {name: value}
        safetensors.torch.save_file(tensors, file, odd | {"sha256": fingerprint(tensors, odd)})
        with pytest.raises(LabError, match="accepted is what `funlora export` writes") as refusal:
            smoke_run.import_class(file)
        assert "delete" not in str(refusal.value)
    torch.save({}, tmp_path / "own.pt")
    safetensors.torch.save_file(tensors, tmp_path / "plain.safetensors")
    for name in ("own.pt", "plain.safetensors"):
        with pytest.raises(LabError, match=f"{name}.*accepted is what `funlora export` writes") as refusal:
            smoke_run.import_class(tmp_path / name)
        assert "delete" not in str(refusal.value)


def test_advice_is_never_what_was_refused(tmp_path):
    with pytest.raises(LabError, match="at least two"):
        data.load(of(make(tmp_path / "one", "only")), tmp_path / "cache")
    for classes in range(2, 120):
        for split in ("1-1", "2-2", "7-3", "200-1"):
            try:
                data.images.tasks(SimpleNamespace(split=split, class_order="natural", data="x"), classes)
            except LabError as reason:
                advised = str(reason).rpartition("for example ")[2].rstrip(".")
                again = SimpleNamespace(split=advised, class_order="natural", data="x")
                assert sum(map(len, data.images.tasks(again, classes))) == classes


def test_output_ends_in_a_sentence_whatever_reads_it(mine, tmp_path, monkeypatch, capsys):
    row, facts = read_tensors(open_folder(mine.folder, "cpu").export_class("b", tmp_path / "b.safetensors"))
    store.write_tensors(tmp_path / "u.safetensors", row, facts | {"class": 5, "name": "日本 語"})
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["import", str(mine.folder), str(tmp_path / "u.safetensors")]) == 0
    assert main(["export", str(mine.folder), "--class", "日本 語", "--to", str(tmp_path / "語")]) == 0
    assert r"Class \u65e5\u672c \u8a9e" in narrow.buffer.getvalue().decode()
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    capsys.readouterr()
    assert main(["list"]) == 141
    assert capsys.readouterr().err == ""


def test_too_little_memory_is_a_sentence_everywhere(tmp_path, monkeypatch, capsys):
    root = make(tmp_path / "d", "a", "b")
    with pytest.raises(LabError, match=r"^Out of memory: lower image_size"):
        data.load(of(root, image_size=2**24), tmp_path / "cache")
    faults = [MemoryError(), OSError(12, "Cannot allocate memory"), torch.OutOfMemoryError("CUDA")]
    for fault in faults:
        monkeypatch.setattr(store, "listing", lambda fault=fault: (_ for _ in ()).throw(fault))
        assert main(["list"]) == 2
        assert capsys.readouterr().err.startswith("funlora: Out of memory: lower ")
    with pytest.raises(RuntimeError, match="something else"), memory_for("x"):
        raise RuntimeError("something else")
