"""The workbench without a kernel or a browser: every widget is set or clicked, and what is shown is checked."""

import ast
import io
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import funlora_lab
from funlora_lab import metrics
from funlora_lab.config import FUNCTIONAL_METHODS, SOLVERS
from funlora_lab.disk import read_lines, read_tensors
from funlora_lab.errors import LabError
from funlora_lab.flow import Solver
from funlora_lab.opened import OpenRun, open_run
from funlora_lab.presets import preset
from funlora_lab.store import Run
from funlora_lab.studies.plots import tile
from funlora_lab.workbench import explore, markup, ownclass, panels, runs

widgets = pytest.importorskip("ipywidgets")
from funlora_lab.workbench.page import Workbench  # noqa: E402
from funlora_lab.workbench.runs_tab import CURVES  # noqa: E402
from funlora_lab.workbench.samples_tab import VIEWS  # noqa: E402

SMALL = preset("smoke")
PATIENCE = 120  # seconds, for a thread on a loaded machine


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("workbench")


@pytest.fixture(scope="module")
def opened(home):
    return open_run(SMALL, "cpu", home=home)


@pytest.fixture(scope="module")
def bench(opened):
    return Workbench(opened)


def rank_in(html: str) -> int:
    return int(re.search(r">rank (\d+)<", html)[1])


def done(job) -> None:
    job.wait(PATIENCE)
    assert not job.busy
    assert job.note.value == "Done.", job.note.value


def sheet(images) -> np.ndarray:
    return markup.row_of_images(images).squeeze()


# --- panel 1: functions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FUNCTIONAL_METHODS)
def test_every_function_shows_the_rank_of_the_matrix_it_draws(bench, method):
    panel = bench.functions
    panel.method.value = method
    view = panel.view()
    assert rank_in(panel.picture.value) == view.rank == np.linalg.matrix_rank(view.F.numpy(), rtol=metrics.TOLERANCE)
    assert view.rank <= view.bound
    assert f"of at most {view.bound} " in panel.picture.value
    drawn = markup.pixels_of(panel.picture.value)
    assert [picture.shape[:2] for picture in drawn] == [(32, 1), (1, 32), (32, 32)]
    assert np.array_equal(drawn[2], panels.around_one(view.F))
    panel.method.value = "funlora"


def test_a_product_has_rank_one_and_the_cosine_raises_it(bench):
    panel = bench.functions
    panel.method.value = "vanilla-mul"
    assert rank_in(panel.picture.value) == 1
    panel.method.value = "funlora"
    assert rank_in(panel.picture.value) > 5
    panel.spread.value = 0.0  # A = B = 1: F is the same everywhere
    assert rank_in(panel.picture.value) == 1
    panel.spread.value = 0.3


def test_every_slider_of_the_functions_panel_changes_the_matrix(bench):
    panel = bench.functions
    before = panel.view().F
    for slider in (panel.ponderations[2], panel.frequencies[1]):
        slider.value += 0.7
        now = panel.view().F
        assert not torch.equal(before, now)
        assert np.array_equal(markup.pixels_of(panel.picture.value)[2], panels.around_one(now))
        before = now
    numbers = {name: value.double() for name, value in panel.numbers().items()}
    assert numbers["frequency"][1] == pytest.approx(panel.frequencies[1].value, abs=1e-6)
    expected = torch.cos(numbers["frequency"][:, None, None] * (numbers["A"][:, None] * numbers["B"][None]))
    assert torch.allclose(now, (numbers["ponderation"][:, None, None] * expected).mean(0), atol=1e-5)


def test_functions_p_ratio_start_and_sizes_do_what_they_say(bench):
    panel = bench.functions
    panel.functions.value = 3
    shown = [slider for slider in panel.ponderations if slider.layout.display != "none"]
    assert len(shown) == len(panel.numbers()["ponderation"]) == 3
    panel.functions.value = 10
    panel.outputs.value, panel.ratio.value = 64, 4
    view = panel.view()
    assert view.F.shape == (64, 32)
    assert torch.equal(view.F[0::4], view.F[1::4])
    assert view.bound == 8
    panel.outputs.value, panel.ratio.value = 32, 1
    panel.spread.value = 0.0
    panel.start.value = "literal"
    assert panel.view().F.mean().item() == pytest.approx(np.cos(np.arange(1, 11)).mean(), abs=1e-5)
    panel.start.value = "equal"
    assert panel.view().F.mean().item() == pytest.approx(1, abs=1e-5)
    panel.start.value, panel.spread.value = "identity", 0.3
    before = panel.view().A
    panel.seed.value = 1
    assert not torch.equal(before, panel.view().A)


def test_learned_numbers_are_shown_as_the_run_stored_them(bench, opened):
    panel = bench.functions
    cls, layer = explore.new_classes(opened)[0], panel.layer.options[3]
    panel.layer.value, panel.source.value = layer, cls
    numbers = explore.layer_numbers(opened, cls, layer)
    view = panel.view()
    expected = explore.function_view("funlora", numbers)
    assert torch.equal(view.F, expected.F)
    assert rank_in(panel.picture.value) == int(metrics.numerical_rank(expected.F))
    assert panel.method.disabled
    panel.source.value = panel.source.options[0][1]
    assert not panel.method.disabled


def test_a_move_in_the_functions_panel_is_fast(bench):
    panel, times = bench.functions, []
    for i in range(20):
        panel.ponderations[0].value = i / 10
        times.append(panel.milliseconds)
    assert sorted(times)[10] < 100


# --- panel 2: samples ---------------------------------------------------------------------------------------------


def test_the_sheet_shows_the_images_that_the_solver_gives(bench, opened):
    panel = bench.samples
    panel.classes.value, panel.count.value, panel.seed.value = (0, 7), 3, 5
    panel.solver.value, panel.steps.value, panel.view.value = "euler", 2, VIEWS[0]
    panel.draw_button.click()
    done(panel.job)
    shown = markup.pixels_of(panel.picture.value)
    for cls, picture in zip((0, 7), shown, strict=True):
        (expected,) = explore.across_runs([opened], cls, 3, Solver("euler", 2), 5).values()
        assert np.array_equal(picture, sheet(expected))
    assert panel.picture.value.count("of 3 recognised") == 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws(bench, solver):
    panel = bench.samples
    panel.classes.value, panel.solver.value, panel.count.value, panel.view.value = (6,), solver, 2, VIEWS[0]
    panel.draw()
    done(panel.job)
    assert len(markup.pixels_of(panel.picture.value)) == 1
    panel.solver.value = "euler"


def test_images_of_an_old_class_are_identical_after_every_task_and_the_badge_says_so(bench, opened):
    panel = bench.samples
    panel.classes.value, panel.view.value = (0, 6), VIEWS[1]
    panel.draw()
    done(panel.job)
    shown = markup.pixels_of(panel.picture.value)
    assert len(shown) == 3 + 2  # class 0 is known after 3 tasks, class 6 after 2
    assert all(np.array_equal(shown[0], other) for other in shown[1:3])
    assert np.array_equal(shown[3], shown[4])
    assert panel.picture.value.count("bit-identical") == 2


def test_the_badge_does_not_flatter_a_method_that_forgets(home):
    forgetful = open_run(SMALL.but(method="fine-tune", base_images=320), "cpu", home=home)
    shown = panels.compare_tasks(forgetful, [0], 2, Solver("euler", 2), 0).html
    pictures = markup.pixels_of(shown)
    assert not np.array_equal(pictures[0], pictures[-1])
    assert "bit-identical" not in shown
    assert "not identical" in shown


def test_runs_are_drawn_side_by_side_from_the_same_noise(bench, opened, home):
    other = open_run(SMALL.but(method="shift"), "cpu", home=home)
    panel = bench.samples
    panel.refresh_button.click()
    both = [opened.run.folder.name, other.run.folder.name]
    panel.runs.value = [name for name in panel.runs.options if name in both]
    panel.classes.value, panel.view.value = (0, 8), VIEWS[2]
    panel.draw()
    done(panel.job)
    base, base_too, new, new_too = markup.pixels_of(panel.picture.value)
    assert np.array_equal(base, base_too), "task 1's classes come from the same base"
    assert not np.array_equal(new, new_too)


def test_the_path_ends_in_the_drawn_image_and_becomes_an_animation(bench, opened):
    panel = bench.samples
    panel.classes.value, panel.view.value, panel.steps.value = (7,), VIEWS[3], 4
    panel.draw()
    done(panel.job)
    strips = markup.pixels_of(panel.picture.value)
    (expected,) = explore.across_runs([opened], 7, panel.count.value, panel.chosen_solver, panel.seed.value).values()
    for strip, image in zip(strips, expected, strict=True):
        assert np.array_equal(strip[:, -8:], image[0].numpy())
    film = Image.open(io.BytesIO(panel.film.value))
    assert film.n_frames == 25
    assert panel.film.layout.display == ""


def test_a_fixed_grid_ends_at_the_same_bits_however_many_states_are_asked_for(opened):
    velocity, x0 = opened.source(7).velocity(), explore.starting_noise(SMALL, 7, 3, 0)
    for name in ("euler", "midpoint", "rk4"):
        solver = Solver(name, 3)
        drawn, evaluations = solver.integrate(velocity, x0)
        for frames in (None, 5, 4):
            states, counted = solver.path(velocity, x0, frames)
            assert torch.equal(states[-1], drawn)
            assert torch.equal(states[0], x0)
            assert counted == evaluations


def test_bending_by_one_changes_nothing_and_by_zero_does(bench, opened):
    panel = bench.samples
    panel.number.value, panel.which.value, panel.factor.value = "ponderation", -1, 0.0
    first, second = markup.pixels_of(panel.bent.value)
    assert not np.array_equal(first, second)
    panel.factor.value = 1.0
    first, second = markup.pixels_of(panel.bent.value)
    assert np.array_equal(first, second)
    for control, value in (
        (panel.which, 1),
        (panel.number, "frequency"),
        (panel.bent_layer, 15),
        (panel.bent_class, 9),
    ):
        control.value = value
        assert len(markup.pixels_of(panel.bent.value)) == 2
    panel.sweep_button.click()
    assert len(markup.pixels_of(panel.bent.value)) == 7


def test_mixtures_run_from_one_class_to_the_other(bench, opened):
    panel = bench.samples
    panel.first.value, panel.second.value = 6, 9
    panel.mix_sweep_button.click()
    strips = markup.pixels_of(panel.mixture.value)
    assert len(strips) == 7
    panel.share.value = 1.0
    (alone,) = markup.pixels_of(panel.mixture.value)
    assert np.array_equal(alone, strips[-1])
    panel.first.value = 9
    panel.share.value = 0.25
    (itself,) = markup.pixels_of(panel.mixture.value)
    x0 = explore.starting_noise(SMALL, 9, panel.count.value, panel.seed.value)
    velocity = opened.source(9).velocity()
    expected = explore.images_of(velocity, x0, panel.chosen_solver, torch.device("cpu"))
    assert np.abs(itself.astype(int) - sheet(expected)).max() <= 1, "a class mixed with itself is that class"


def test_a_mistake_is_shown_as_a_sentence(bench):
    panel = bench.samples
    panel.classes.value = ()
    panel.draw()
    panel.job.wait(PATIENCE)
    assert "No class is chosen" in panel.job.note.value
    assert "Traceback" not in panel.job.note.value


# --- panel 3: layers ----------------------------------------------------------------------------------------------


def test_the_heatmap_shows_every_convolution_and_the_values_of_the_adapted_ones(bench, opened):
    panel, layers = bench.layers, explore.unet_layers(SMALL)
    for measure in explore.MEASURES:
        panel.measure.value = measure
        values = explore.layer_values(opened, measure).mean()
        for layer in layers:
            title = re.search(rf"<title>{layer.index}: ([^<]*)</title>", panel.picture.value)[1]
            shown = f"{values[layer.index]:.3g}" if layer.index in values else "not adapted"
            assert title.startswith(layer.name)
            assert title.endswith(shown)


def test_layers_know_where_they_are():
    layers = explore.unet_layers(preset("cifar10"))
    assert len(layers) == 65
    assert {layer.size for layer in layers} == {32, 16, 8, 4}
    assert [layer.size for layer in layers if layer.part == "middle"] == [4] * 4
    assert (layers[0].size, layers[-1].size, layers[-1].outputs) == (32, 32, 3)


def test_a_layer_is_chosen_by_slider_or_button_and_its_table_holds_the_computed_ranks(bench, opened):
    panel = bench.layers
    panel.layer.value = 20
    before = panel.spectra.value
    panel.buttons[13].click()
    assert panel.layer.value == 13
    assert panel.spectra.value != before
    table = explore.layer_table(opened, 13)
    for cls in explore.new_classes(opened):
        view = explore.function_view("funlora", explore.layer_numbers(opened, cls, 13))
        assert table.loc[opened.classes[cls], "rank"] == view.rank
        assert f"<td>{view.rank}</td>" in panel.table.value
    everything = panel.spectra.value
    panel.compared.value = panel.compared.value[:1]
    assert panel.spectra.value != everything
    panel.of_class.value = opened.classes[explore.new_classes(opened)[0]]
    assert "class 6" in panel.picture.value


# --- panel 4: runs ------------------------------------------------------------------------------------------------


def test_the_table_is_filtered_and_sorted(bench, opened):
    panel = bench.runs
    panel.refresh()
    assert opened.run.folder.name in panel.picture.value
    panel.filter.value = "no such run"
    assert len(panel.table()) == 0
    panel.filter.value = "smoke funlora"
    assert panel.table()["run"].tolist() == [opened.run.folder.name]
    panel.filter.value = ""
    panel.by.value = "seed"
    for down in (True, False):
        panel.down.value = down
        seeds = panel.table()["seed"].tolist()
        assert seeds == sorted(seeds, reverse=down)
    panel.state.value = "unfinished"
    assert len(panel.table()) == 0
    panel.state.value = ""
    panel.by.value, panel.down.value = "started", True


def test_curves_of_the_chosen_runs_are_laid_over_one_another(bench, opened, home):
    other = open_run(SMALL.but(method="shift"), "cpu", home=home)
    panel = bench.runs
    panel.refresh()
    panel.chosen.value = [opened.run.folder.name]
    one = panel.curves.value
    panel.chosen.value = [opened.run.folder.name, other.run.folder.name]
    assert panel.curves.value != one
    for kind in CURVES:
        panel.curve.value = kind
        assert Image.open(io.BytesIO(panel.curves.value)).size[0] > 300
    panel.chosen.value = []
    assert panel.curves.layout.display == "none"
    panel.curve.value = CURVES[0]


def test_a_run_is_started_stopped_and_resumed_from_the_panel(bench, home):
    panel = bench.runs
    panel.preset.value, panel.method.value, panel.seed.value = "smoke", "power", 4
    panel.settings.value = "adapter_images=80000 adapter_batch=8 samples_per_class=40"
    panel.start_button.click()
    (started,) = panel.started.values()
    name, began = started.run.folder.name, time.monotonic()
    while not any(e["event"] == "loss" and e["stage"] == "adapter" for e in started.run.events()):
        assert started.going, started.last_words()
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.1)
    panel.chosen.value = [name]
    panel.stop_button.click()
    panel.wait(PATIENCE)
    assert not started.going
    assert "resumes" in panel.note.value
    states = runs.table(home).set_index("run")["state"]
    assert states[name] == "unfinished"
    assert list((home / "artefacts").glob("*/state.safetensors")), "the step it had come to is saved"
    panel.chosen.value = [name]
    panel.resume_button.click()
    again = panel.started[name]
    while "step" not in panel.note.value:
        assert again.going, again.last_words()
        assert time.monotonic() - began < 2 * PATIENCE
        time.sleep(0.1)
    steps = [e["step"] for e in started.run.events() if e["event"] == "loss" and e["stage"] == "adapter"]
    assert steps
    panel.chosen.value = []
    panel.stop_button.click()  # with none chosen: those that go
    panel.wait(PATIENCE)
    assert not again.going


def test_a_bad_setting_is_refused_in_a_sentence_before_anything_starts(bench):
    panel = bench.runs
    before = dict(panel.started)
    panel.settings.value = "adapter_imagse=100"
    panel.start_button.click()
    assert "did you mean adapter_images" in panel.note.value
    assert panel.started == before
    panel.settings.value = ""


def test_words_give_the_experiment_back():
    from funlora_lab.__main__ import _parser
    from funlora_lab.commands import experiment_of

    experiment = SMALL.but(seed=3, method="power", multipliers=(1, 1, 2), flip=True, adapter_lr=0.02)
    assert experiment_of(_parser().parse_args(["run", *runs.words(experiment)])) == experiment


# --- panel 5: a class of one's own --------------------------------------------------------------------------------


def drawn_class(panel) -> None:
    """Two crosses, by clicks on the canvas."""
    panel.forget()
    for shift in (0, 1):
        for i in range(8):
            for column in {i, (7 - i + shift) % 8}:
                panel.canvas.cells[8 * i + column].click()
        panel.add_drawing()


def test_a_drawn_class_is_trained_shown_and_scored(bench, opened):
    panel = bench.own_class
    drawn_class(panel)
    assert len(markup.pixels_of(panel.drawn.value)) == 1
    assert panel.pictures().shape == (2, 1, 8, 8)
    assert panel.pictures()[0, 0].bool().sum() == 16
    assert not panel.canvas.pixels.any(), "the canvas is clear again"
    panel.name.value, panel.images.value = "cross", 200
    before = opened.results["accuracy"]
    panel.train_button.click()
    done(panel.job)
    learned = panel.learned
    assert set(learned.after) == {*opened.classes, "cross"}
    assert learned.before == pytest.approx(ownclass.accuracies(opened))
    assert np.array_equal(markup.pixels_of(panel.picture.value)[0], sheet(learned.samples[:12]))
    assert opened.results["accuracy"] == before, "the run itself is untouched"
    panel.export_button.click()
    assert "Written:" in panel.exported.value
    (path,) = (opened.run.folder / "exported").glob("*-cross.safetensors")
    shutil.copytree(opened.run.folder, opened.run.folder.with_name("a-copy"))
    other = OpenRun(Run.at(opened.run.folder.with_name("a-copy")), opened.runtime)
    assert other.import_class(path) == learned.cls
    assert other.known[learned.cls] == "cross"
    row = other.row(learned.cls)
    assert all(torch.equal(value, learned.learner.rows[learned.cls][name]) for name, value in row.items())
    assert any(not torch.equal(value, opened.adapters.start(learned.cls)[name]) for name, value in row.items())


def test_training_stops_at_once_and_goes_on_later(bench, home):
    panel = bench.own_class
    drawn_class(panel)
    panel.name.value, panel.images.value = "slow cross", 16_000

    def train_past(step: int) -> int:
        """Train until a step is told, stop, and return the step that was saved."""
        panel.train_button.click()
        began = time.monotonic()
        while told_step(panel.job.note.value) <= step:
            assert panel.job.busy, panel.job.note.value
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.02)
        panel.job.stop_button.click()
        panel.job.wait(PATIENCE)
        assert "Stopped" in panel.job.note.value
        return read_tensors(state())[1]["step"]

    def state() -> Path:
        return max((home / "artefacts").glob("*/state.safetensors"), key=lambda path: path.stat().st_mtime)

    first = train_past(0)
    second = train_past(first)
    assert second > first > 0
    steps = [event["step"] for event in read_lines(state().with_name("log.jsonl"))]
    assert steps == sorted(set(steps)), "it went on from where it had stopped"


def told_step(sentence: str) -> int:
    found = re.search(r"step ([\d,]+)", sentence)
    return int(found[1].replace(",", "")) if found else 0


def test_a_folder_of_pictures_is_read_and_a_bad_one_refused(bench, tmp_path):
    for i, size in enumerate(((8, 8), (30, 20), (9, 40))):
        Image.new("RGB", size, (80 * i, 10, 10)).save(tmp_path / f"{i}.png")
    panel = bench.own_class
    panel.folder.value = str(tmp_path)
    assert panel.pictures().shape == (3, 1, 8, 8)
    (tmp_path / "9.png").write_text("no picture")
    panel.train_button.click()
    panel.job.wait(PATIENCE)
    assert "9.png" in panel.job.note.value
    panel.folder.value = str(tmp_path / "missing")
    panel.train_button.click()
    panel.job.wait(PATIENCE)
    assert "There is no folder" in panel.job.note.value
    panel.folder.value = ""


@pytest.mark.parametrize(("name", "count"), [("3", 4), ("", 4), ("mine", 1)])
def test_a_class_that_cannot_be_learned_is_refused(opened, name, count):
    with pytest.raises(LabError):
        next(ownclass.learn(opened, name, torch.zeros(count, 1, 8, 8, dtype=torch.uint8)))


def test_shifted_copies_are_moved_by_one_pixel():
    image = torch.randint(0, 255, (2, 1, 8, 8), dtype=torch.uint8)
    moved = ownclass.shifted(image)
    assert moved.shape == (18, 1, 8, 8)
    assert torch.equal(moved[:2], image)
    assert any(torch.equal(part[..., 1:, :], image[..., :-1, :]) for part in moved.split(2))


# --- panel 6 and the house ----------------------------------------------------------------------------------------


def test_the_report_panel_writes_a_page(bench, opened):
    panel = bench.report
    panel.write_button.click()
    done(panel.job)
    page = panel.path.read_text()
    assert f"{opened.results['LA']:.4f}" in page
    assert "comparisons, nothing changed" in page
    assert len(re.findall(r"<td>unchanged</td>", page)) > 20
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=.http", page)
    assert str(panel.path) in panel.picture.value


def test_only_the_workbench_needs_jupyter():
    folder = Path(funlora_lab.__file__).parent
    for path in folder.rglob("*.py"):
        name = str(path.relative_to(folder))
        names = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
        }
        shows = name in ("workbench/page.py", "workbench/parts.py") or name.endswith("_tab.py")
        assert ("ipywidgets" in names) <= shows, name


def test_rows_of_images_hold_the_images():
    images = torch.randint(0, 255, (3, 1, 8, 8), dtype=torch.uint8)
    row = markup.row_of_images(images)
    assert row.shape == (8, 26, 1)
    assert np.array_equal(row[:, 9:17], tile(images[1:2], 1))
    assert np.array_equal(markup.pixels_of(markup.picture(row, 4, "x"))[0], row.squeeze())
