"""The workbench without a kernel or a browser: every widget is set or clicked, and what is shown is checked."""

import base64
import io
import re
import shlex
import shutil
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from funlora_lab import LabError, continual, function, open_run, preset
from funlora_lab.__main__ import _parser
from funlora_lab.adapters import METHODS
from funlora_lab.commands import experiment_of
from funlora_lab.continual import OpenRun
from funlora_lab.experiment import REGISTERED_TEXTS
from funlora_lab.flow import SOLVERS, Solver
from funlora_lab.store import Run, read_json, read_lines, read_tensors, write_json
from funlora_lab.studies.rank import TOLERANCE
from funlora_lab.workbench import layers, markup, page, report, runs, runs_panel
from funlora_lab.workbench.images import SameNoise

SMALL, PATIENCE = preset("smoke"), 120  # seconds, for a thread on a loaded machine


@pytest.fixture(scope="module")
def house(smoke_home, tmp_path_factory):
    """A home with three finished runs, and the workbench over the first."""
    home = shutil.copytree(smoke_home, tmp_path_factory.mktemp("workbench") / "home")
    short = SMALL.but(score_after="last", adapter_images=48)
    changed = (short.but(method="vanilla-mul", rank=2, ratio=2), short.but(method="fine-tune"))
    run, other, once = (open_run(one, "cpu", home=home) for one in (SMALL, *changed))
    return SimpleNamespace(home=home, run=run, other=other, once=once, bench=page.Workbench(run))


def pixels_of(html: str) -> list[np.ndarray]:
    """The bytes of every PNG inside a piece of HTML, in order."""
    parts = html.split("data:image/png;base64,")[1:]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(part.split('"')[0])))) for part in parts]


def rank_in(panel) -> int:
    return int(re.search(r">rank (\d+)<", panel.picture.value)[1])


def row_of(images) -> np.ndarray:
    return markup.row_of_images(images).squeeze()


def put(panel, **values) -> None:
    """Set controls one after the other."""
    for name, value in values.items():
        getattr(panel, name).value = value


def ended(panel, words: str = "Done.") -> None:
    panel.job.thread.join(PATIENCE)
    assert (panel.job.thread.is_alive(), "Traceback" in panel.job.note.value) == (False, False)
    assert words in panel.job.note.value


def drawn(panel, view: int, **values) -> list[np.ndarray]:
    """Set the samples panel, draw, and return the pictures that it shows."""
    put(panel, view=panel.view.options[view], **values)
    panel.draw_button.click()
    ended(panel)
    return pixels_of(panel.picture.value)


def until(holds, going, reason) -> None:
    began = time.monotonic()
    while not holds():
        assert going(), reason()
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.02)


def test_every_function_shows_the_rank_of_the_matrix_it_draws_and_every_slider_changes_it_fast(house):
    panel, methods = house.bench.functions, [name for name, method in METHODS.items() if method.matrix]
    assert [name for _, name in panel.method.options] == methods
    for method in methods:
        panel.method.value = method
        view, pictures = panel.view(), pixels_of(panel.picture.value)
        assert rank_in(panel) == view.rank == np.linalg.matrix_rank(view.F.numpy(), rtol=TOLERANCE) <= view.bound
        shapes, words = [picture.shape[:2] for picture in pictures], f"of at most {view.bound} "
        assert (shapes, words in panel.picture.value) == ([(32, 1), (1, 32), (32, 32)], True)
        assert np.array_equal(pictures[2], layers.around_one(view.F))
    for method, amount, ranks in (("vanilla-mul", 0.3, [1]), ("funlora", 0.0, [1]), ("funlora", 0.3, range(6, 33))):
        put(panel, method=method, spread=amount)  # a product has rank one, a constant too, and the cosine raises it
        assert rank_in(panel) in ranks
    for slider in (panel.ponderations[2], panel.frequencies[1]):
        before = panel.view().F
        slider.value += 0.7
        assert not torch.equal(before, panel.view().F)
        assert np.array_equal(pixels_of(panel.picture.value)[2], layers.around_one(panel.view().F))
    numbers = {name: value.double() for name, value in panel.numbers().items()}
    assert numbers["frequency"][1] == pytest.approx(panel.frequencies[1].value, abs=1e-6)
    expected = torch.cos(numbers["frequency"][:, None, None] * (numbers["A"][:, None] * numbers["B"][None]))
    assert torch.allclose(panel.view().F, (numbers["ponderation"][:, None, None] * expected).mean(0), atol=1e-5)
    times = [setattr(panel.ponderations[0], "value", i / 10) or panel.milliseconds for i in range(20)]
    assert sorted(times)[10] < 100


def test_functions_p_ratio_start_and_sizes_do_what_they_say_and_learned_numbers_are_shown_as_stored(house):
    panel = house.bench.functions
    panel.functions.value = 3
    shown = [slider for slider in panel.ponderations if slider.layout.display != "none"]
    assert len(shown) == len(panel.numbers()["ponderation"]) == 3
    put(panel, functions=10, outputs=64, ratio=4)
    view = panel.view()
    assert (view.F.shape, view.bound) == ((64, 32), 8)
    assert torch.equal(view.F[0::4], view.F[1::4])
    put(panel, outputs=32, ratio=1, spread=0.0)
    for start, mean in {"literal": np.cos(np.arange(1, 11)).mean(), "equal": 1}.items():
        panel.start.value = start
        assert panel.view().F.mean().item() == pytest.approx(mean, abs=1e-5)
    put(panel, start="identity", spread=0.3)
    before = panel.view().A
    panel.seed.value = 1
    assert not torch.equal(before, panel.view().A)
    cls = min(house.run.generator.rows)
    put(panel, layer=panel.layer.options[3], source=cls)
    expected = layers.function_view("funlora", layers.AdaptedLayers(house.run).numbers(cls, panel.layer.value))
    assert torch.equal(panel.view().F, expected.F)
    assert (rank_in(panel), panel.method.disabled) == (expected.rank, True)
    panel.source.value = panel.source.options[0][1]
    assert not panel.method.disabled
    table = layers.AdaptedLayers(house.other).table(12)
    assert set(table["bound"]) == {2}, "the bound of learned numbers counts the rank and the ratio"
    assert (table["rank"] <= 2).all()
    assert METHODS["funlora"].bound(layers.settings_of("funlora", ratio=2), 16, 16) == 8


@patch.dict(METHODS)  # taken out again afterwards
@patch.dict(REGISTERED_TEXTS)
def test_a_function_of_the_user_is_in_every_list_and_can_be_moved(house):
    @function("halved", phase=lambda p: torch.arange(1.0, p + 1))
    def halved(A, B, ponderation, phase):
        """the cosine of half the product, shifted"""
        waves = (phase[..., None, None] + 0.5 * A[:, None, :, None] * B[:, None, None, :]).cos()
        return (ponderation[..., None, None] * waves).mean(1)

    panel = (bench := page.Workbench(house.run)).functions
    panel.method.value = "halved"
    before = panel.view().F
    assert ("halved" in bench.runs.method.options, panel.exponents_name.value) == (True, "phases")
    panel.frequencies[0].value += 1
    assert (rank_in(panel), torch.equal(before, panel.view().F)) == (panel.view().rank, False)


def test_samples_of_every_solver_are_the_same_after_every_task_in_every_run_and_at_the_end_of_their_path(house):
    panel, bare = house.bench.samples, lambda x: row_of(((x + 1) * 127.5).round().clamp(0, 255).byte())
    for name in SOLVERS:
        shown = drawn(panel, 0, classes=(0, 7), count=3, seed=5, solver=name, steps=2)
        for cls, picture in zip((0, 7), shown, strict=True):
            with torch.no_grad():
                velocity, solver = house.run.source(cls).velocity(), Solver(name, 2, SMALL.tolerance)
                assert np.array_equal(picture, bare(solver.integrate(velocity, panel.drawer.noise(cls))[0]))
        assert panel.picture.value.count("of 3 recognised") == 2
    put(panel, solver="euler", classes=())
    panel.draw_button.click()
    ended(panel, "No class is chosen")
    shown = drawn(panel, 1, classes=(0, 6))
    assert len(shown) == 3 + 2  # class 0 is known after 3 tasks, class 6 after 2
    assert all(np.array_equal(*pair) for pair in ((shown[0], shown[1]), (shown[0], shown[2]), (shown[3], shown[4])))
    assert panel.picture.value.count("bit-identical") == 2
    forgotten = SameNoise(house.once, 2, Solver("euler", 2)).compare_tasks([0]).html
    assert not np.array_equal(*pixels_of(forgotten)[::2])
    assert ("bit-identical" in forgotten, "not identical" in forgotten) == (False, True), "the badge does not flatter"
    both = [house.run.run.folder.name, house.other.run.folder.name]
    panel.refresh_button.click()
    panel.runs.value = [name for name in panel.runs.options if name in both]
    base, base_too, new, new_too = drawn(panel, 2, classes=(0, 8))
    assert np.array_equal(base, base_too), "task 1's classes come from the same base"
    assert not np.array_equal(new, new_too)
    for strip, image in zip(drawn(panel, 3, classes=(7,), steps=4), panel.drawer.images(7), strict=True):
        assert np.array_equal(strip[:, -8:], image[0].numpy())
    assert (Image.open(io.BytesIO(panel.film.value)).n_frames, panel.film.layout.display) == (25, "")
    velocity, x0 = house.run.source(7).velocity(), panel.drawer.noise(7)
    for solver in (Solver(name, 3) for name in ("euler", "midpoint", "rk4")):
        images, evaluations = solver.integrate(velocity, x0)
        for frames in (0, 5, 4):  # however many states are asked for, a fixed grid ends at the same bits
            states, counted = solver.path(velocity, x0, frames)
            assert torch.equal(states[[0, -1]], torch.stack([x0, images]))
            assert counted == evaluations


def test_scaled_numbers_and_mixed_classes_are_drawn_below_the_learned_ones(house):
    panel = house.bench.samples
    for factor in (0.0, 1.0):
        put(panel, number="ponderation", which=-1, factor=factor)
        learned, scaled = pixels_of(panel.scaled.value)
        assert np.array_equal(learned, scaled) == (factor == 1)
    for name, value in {"which": 1, "number": "frequency", "layer": 15, "of_class": 9}.items():
        put(panel, **{name: value})
        assert len(pixels_of(panel.scaled.value)) == 2
    panel.scale_sweep_button.click()
    assert len(pixels_of(panel.scaled.value)) == 8
    wide = open_run(SMALL.but(method="lora-conv-v2", score_after="none"), "cpu", home=house.home)
    assert len(pixels_of(SameNoise(wide, 2, Solver("euler", 1)).scaled(6, 15, "A", 0, (0.0, 2.0)).html)) == 3
    put(panel, first=6, second=9)
    panel.mix_sweep_button.click()
    strips = pixels_of(panel.mixed.value)
    assert (len(strips), np.array_equal(*strips[:2])) == (8, True)
    panel.share.value = 1.0
    assert np.array_equal(pixels_of(panel.mixed.value)[1], strips[-1])
    put(panel, first=9, share=0.25)
    difference = pixels_of(panel.mixed.value)[1].astype(int) - row_of(panel.drawer.images(9))
    assert np.abs(difference).max() <= 1, "a class mixed with itself is that class"


def test_the_heatmap_shows_every_convolution_and_the_table_of_a_chosen_layer_the_ranks(house):
    panel, table = house.bench.layers, layers.unet_layers(SMALL)
    for measure in layers.MEASURES:
        panel.measure.value = measure
        values = panel.adapted.values(measure).mean()
        for i, name in enumerate(table["name"]):
            shown = f"{values[i]:.3g}" if i in values else "not adapted"
            assert re.search(rf"<title>{i}: {re.escape(name)}[^<]* {shown}</title>", panel.picture.value)
    table = layers.unet_layers(preset("cifar10"))
    middle = table.loc[table["part"] == "middle", "size"].tolist()
    assert (len(table), set(table["size"]), middle) == (65, {32, 16, 8, 4}, [4] * 4)
    assert (table["size"][0], table["size"][64], table["outputs"][64]) == (32, 32, 3)
    new, names = list(house.run.generator.rows), house.run.classes
    panel.layer.value = 20
    before = panel.spectra.value
    panel.buttons[13].click()
    everything = panel.spectra.value
    assert (panel.layer.value, everything == before) == (13, False)
    for cls in new:
        view = layers.function_view("funlora", panel.adapted.numbers(cls, 13))
        assert panel.adapted.table(13).loc[names[cls], "rank"] == view.rank
        assert f"<td>{view.rank}</td>" in panel.table.value
    put(panel, compared=panel.compared.value[:1], of_class=names[new[0]])
    assert panel.spectra.value != everything
    assert f"class {names[new[0]]}" in panel.picture.value


def test_the_table_is_filtered_and_sorted_and_curves_are_laid_over_one_another(house):
    panel, name = house.bench.runs, house.run.run.folder.name
    panel.refresh()
    assert name in panel.picture.value
    for words, state, found in (("no such", "", []), (f"smoke {name[-8:].upper()}", "", [name]), ("", "running", [])):
        put(panel, filter=words, state=state)
        assert panel.table()["run"].tolist() == found
    put(panel, state="", by="LA")
    for descending in (False, True):
        panel.descending.value = descending
        scores = panel.table()["LA"].dropna().tolist()
        assert scores == sorted(scores, reverse=descending) != scores[:1]
    put(panel, by="started", chosen=[name])
    one = panel.curves.value
    panel.chosen.value = [name, house.other.run.folder.name]
    assert panel.curves.value != one
    for _, kind in panel.curve.options:
        panel.curve.value = kind
        assert Image.open(io.BytesIO(panel.curves.value)).size[0] > 300
    put(panel, chosen=[], curve="accuracy")
    assert panel.curves.layout.display == "none"


def test_runs_scored_once_of_older_settings_and_damaged_ones_are_listed_and_reported(house, tmp_path):
    never = open_run(SMALL.but(score_after="none", data_root="/a b/$HOME"), "cpu", home=house.home)
    real = open_run(SMALL.but(method="classifier-multitask", score_after="last"), "cpu", home=house.home)
    for one in (house.once, real, never):
        text = report.page(one)
        for words in (text, runs.progress(one.run)[1], repr(page.Workbench(one))):
            assert "not measured" in words
    samples = page.Workbench(real).samples
    samples.draw_button.click()
    ended(samples, "draws no images")
    _, *words = shlex.split(unescape(re.search(r"<code>(funlora run [^<]*)</code>", text)[1]))
    assert experiment_of(_parser().parse_args(words)) == never.experiment, "the printed command is quoted"
    older = shutil.copytree(house.run.run.folder, tmp_path / "runs" / "older")
    stored = read_json(older / "config.json")
    del stored["experiment"]["base_weights"]  # a setting that came later, at its default
    write_json(older / "config.json", stored)
    shutil.copytree(house.once.run.folder, older.with_name("once"))
    (shutil.copytree(older, older.with_name("damaged")) / "config.json").write_text("{}")
    frame = runs.table(older.parent, by="run").set_index("run")
    assert frame["state"].to_dict() == {"older": "finished", "once": "finished", "damaged": "damaged"}
    assert frame["AIA"].isna().to_dict() == {"older": False, "once": True, "damaged": True}
    assert "–" in markup.table(frame)
    experiment = SMALL.but(seed=3, method="power", multipliers=(1, 1, 2), flip=True, adapter_lr=0.02)
    assert experiment_of(_parser().parse_args(runs.arguments(experiment))) == experiment


def test_a_run_is_started_stopped_and_resumed_from_the_panel(house, monkeypatch):
    monkeypatch.setattr(runs_panel, "EVERY", 0.1)
    panel = house.bench.runs
    put(panel, preset="smoke", method="power", seed=0, settings="adapter_imagse=100")
    panel.start_button.click()
    assert ("did you mean adapter_images" in panel.note.value, panel.started) == (True, {}), "refused at once"
    panel.settings.value = "adapter_images=80000 adapter_batch=8 samples_per_class=40"
    panel.start_button.click()
    ((name, started),) = panel.started.items()
    until(lambda: "adapter of class" in panel.note.value, lambda: started.going, started.reason)
    panel.chosen.value = [name]
    panel.stop_button.click()
    panel.watcher.join(PATIENCE)
    assert (started.going, "resumes" in panel.note.value) == (False, True)
    assert runs.table(house.home).set_index("run")["state"][name] == "unfinished"
    assert list((house.home / "artefacts").glob("*/state.safetensors")), "the step it had come to is saved"
    panel.chosen.value = [name]
    panel.resume_button.click()
    again = panel.started[name]
    until(lambda: "step" in panel.note.value, lambda: again.going, again.reason)
    panel.chosen.value = []
    panel.stop_button.click()  # with none chosen: those that go
    panel.watcher.join(PATIENCE)
    assert not again.going


def test_a_drawn_class_is_trained_shown_scored_and_exported_and_training_stops_and_goes_on(house):
    panel, run = house.bench.own_class, house.run
    before = run.results["accuracy"]
    for shift in (0, 1):  # two crosses, by clicks
        for i in range(8):
            for column in {i, (7 - i + shift) % 8}:
                panel.canvas.cells[8 * i + column].click()
        panel.add_drawing()
    assert (len(pixels_of(panel.drawn.value)), panel.canvas.pixels.any()) == (1, False), "the canvas is clear again"
    assert (panel.pictures().shape, panel.pictures()[0, 0].bool().sum()) == ((2, 1, 8, 8), 16)
    put(panel, name="cross", images=200)
    panel.train_button.click()
    ended(panel)
    learned, cls = panel.learned, panel.learned.cls
    assert set(learned.after) == {*run.classes, "cross"}
    assert learned.before == pytest.approx(run.class_accuracies)
    assert np.array_equal(pixels_of(panel.picture.value)[0], row_of(learned.samples[:12]))
    assert (run.results["accuracy"], cls in run.generator.rows) == (before, False), "the run itself is untouched"
    panel.export_button.click()
    assert "Written:" in panel.exported.value
    (path,) = (run.run.folder / "exported").glob("*-cross.safetensors")
    other = OpenRun(Run.at(shutil.copytree(run.run.folder, run.run.folder.with_name("a-copy"))), run.runtime)
    assert (other.import_class(path), other.known[cls]) == (cls, "cross")
    assert all(torch.equal(value, learned.generator.rows[cls][name]) for name, value in other.row(cls).items())
    assert any(not torch.equal(value, run.adapters.start(cls)[name]) for name, value in other.row(cls).items())
    put(panel, name="slow cross", images=16_000)  # training stops at once and goes on later

    def train_past(share: float) -> Path:
        """Train until the bar is past a share, stop, and return the file of what was saved."""
        panel.train_button.click()
        until(lambda: panel.job.bar.value > share, panel.job.thread.is_alive, lambda: panel.job.note.value)
        panel.job.stop_button.click()
        ended(panel, "Stopped")
        return max((house.home / "artefacts").glob("*/state.safetensors"), key=lambda path: path.stat().st_mtime)

    first = read_tensors(state := train_past(0.0))[1]["step"]
    assert read_tensors(train_past(panel.job.bar.value))[1]["step"] > first > 0
    steps = [event["step"] for event in read_lines(state.with_name("log.jsonl"))]
    assert steps == sorted(set(steps)), "it went on from where it had stopped"


def test_a_folder_of_pictures_is_read_and_what_cannot_be_learned_refused(house, tmp_path):
    for i, size in enumerate(((8, 8), (30, 20), (9, 40))):
        Image.new("RGB", size, (80 * i, 10, 10)).save(tmp_path / f"{i}.png")
    panel = house.bench.own_class
    panel.folder.value = str(tmp_path)
    assert panel.pictures().shape == (3, 1, 8, 8)
    (tmp_path / "9.png").write_text("no picture")
    for folder, words in ((tmp_path, "9.png"), (tmp_path / "missing", "There is no folder")):
        panel.folder.value = str(folder)
        panel.train_button.click()
        ended(panel, words)
    panel.folder.value = ""
    for name, count in (("3", 4), ("", 4), ("mine", 1)):
        with pytest.raises(LabError):
            continual.learn(house.run, name, torch.zeros(count, 1, 8, 8, dtype=torch.uint8))
    moved = continual.shifted(image := torch.randint(0, 255, (2, 1, 8, 8), dtype=torch.uint8))
    assert (moved.shape, torch.equal(moved[:2], image)) == ((18, 1, 8, 8), True)
    assert any(torch.equal(part[..., 1:, :], image[..., :-1, :]) for part in moved.split(2))


def test_the_report_panel_writes_a_page(house):
    panel = house.bench.report
    panel.write_button.click()
    ended(panel)
    text = panel.path.read_text()
    assert re.search(rf"{house.run.results['LA']:.4f}.*comparisons, nothing changed", text, re.DOTALL)
    assert len(re.findall(r"<td>unchanged</td>", text)) > 20
    assert not re.findall(r"(?:src|href)=.http|<script", text)
    assert str(panel.path) in panel.picture.value
    (row,) = pixels_of(markup.picture(images := torch.randint(0, 255, (3, 1, 8, 8), dtype=torch.uint8), "x"))
    assert row.shape == (8, 26)
    assert np.array_equal(row[:, 9:17], images[1, 0]), "rows of images hold the images"


def test_only_the_panels_need_jupyter():
    needs = re.compile(r"^ *(from|import) (ipywidgets|IPython|funlora_lab\.workbench\.(\w*panel|page)\b)", re.MULTILINE)
    for path in Path(layers.__file__).parent.glob("*.py"):
        shows = path.stem in ("page", "panel") or path.stem.endswith("_panel")
        assert bool(needs.search(path.read_text())) <= shows, path
