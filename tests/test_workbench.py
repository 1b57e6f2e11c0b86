"""The workbench without a kernel or a browser: every control is set or pressed, and what is shown is checked."""

import base64
import io
import re
import shlex
import shutil
import time
from html import unescape
from pathlib import Path
from threading import Event, Thread
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
from funlora_lab.experiment import REGISTERED_TEXTS
from funlora_lab.flow import SOLVERS, Solver
from funlora_lab.store import Run, locked, read_json, read_lines, read_tensors, write_json
from funlora_lab.studies import plots, sweeps
from funlora_lab.studies.rank import TOLERANCE
from funlora_lab.workbench import images, layers, markup, page, panel, report, runs, runs_panel
from funlora_lab.workbench.images import SameNoise
from funlora_lab.workbench.lens import Bend, Lens

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


def row_of(images) -> np.ndarray:
    return markup.row_of_images(images).squeeze()


def put(panel, **values) -> None:
    """Set controls one after the other."""
    for name, value in values.items():
        setattr(panel, name, value)


def ended(panel, words: str = "Done.") -> None:
    panel.thread.join(PATIENCE)
    assert (panel.thread.is_alive(), "unforeseen" in panel.bar) == (False, False), panel.bar
    assert words in panel.bar


def until(holds, going=lambda: True, reason=lambda: "") -> None:
    began = time.monotonic()
    while not holds():
        assert going(), reason()
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.02)


def rank_in(lens) -> int:
    return int(re.search(r">rank (\d+)<", lens.picture)[1])


def test_the_lens_shows_the_function_of_every_learned_layer_and_every_slider_changes_it_fast(house):
    lens, adapted = house.bench.lens, layers.AdaptedLayers(house.run)
    cls = min(house.run.generator.rows)
    for layer in (11, 20):
        put(lens, cls=cls, layer=layer)
        view = adapted.view(cls, layer)
        assert rank_in(lens) == view.rank == np.linalg.matrix_rank(view.F.numpy(), rtol=TOLERANCE) <= view.bound
        assert np.array_equal(pixels_of(lens.picture)[2], layers.around_one(view.F))
        assert lens.ponderation == pytest.approx(adapted.numbers(cls, layer)["ponderation"].tolist())
    for name in ("ponderation", "frequency"):
        before, values = lens.lens.view(lens.bend).F, list(getattr(lens, name))
        values[1] += 0.7
        setattr(lens, name, values)
        assert not torch.equal(before, lens.lens.view(lens.bend).F)
        assert np.array_equal(pixels_of(lens.picture)[2], layers.around_one(lens.lens.view(lens.bend).F))
        assert f"{lens.layer}.{name}.1=" in lens.text
    A, B, ponderation, frequency = (
        lens.lens.numbers(lens.bend, 20)[name] for name in ("A", "B", "ponderation", "frequency")
    )
    expected = torch.cos(frequency[:, None, None] * (A[:, None] * B[None]))
    assert torch.allclose(lens.lens.view(lens.bend).F, (ponderation[:, None, None] * expected).mean(0))
    times = []
    for _i in range(20):
        begun = time.perf_counter()
        lens.frequency = [value + 0.1 for value in lens.frequency]
        times.append(time.perf_counter() - begun)
    assert sorted(times)[10] < 0.1
    lens.press("reset")
    assert lens.lens.view(lens.bend).F.equal(adapted.view(cls, 20).F)


def test_images_of_a_bent_class_are_those_of_its_numbers_and_a_state_is_reproduced_by_its_text_and_undone(house):
    lens, bent = house.bench.lens, Lens(house.run)
    solver, names = Solver("midpoint", 2), bent.adapted.names
    learned = bent.draw(Bend(7, 11), solver)
    assert torch.equal(learned.states[-1], SameNoise(house.run, 8, solver).images(7))
    everything_off = bent.row(Bend(7, 11, off=tuple(names)))
    neutral = house.run.adapters.neutral()
    assert all(torch.equal(everything_off[name], value) for name, value in neutral.items())
    one = bent.row(Bend(7, 11, off=(12,), changed={(11, "frequency", 2): 4.5, (13, "spread"): 0.1}))
    differ = {name.rpartition("/")[0] for name, value in house.run.row(7).items() if not torch.equal(one[name], value)}
    assert differ == {names[11], names[12], names[13]}
    assert one[f"{names[11]}/frequency"][2] == 4.5
    state = "class=7 layer=13 off=12,14 13.spread=0.1 11.frequency.2=4.5"
    assert str(Bend.read(state)) == state
    lens.text = state
    assert (lens.bend, lens.cls, lens.layer, lens.spread) == (Bend.read(state), 7, 13, 0.1)
    assert "still the images before" in lens.note
    shown = bent.draw(Bend.read(state), solver, 9).states[-1]
    until(lambda: np.array_equal(pixels_of(lens.samples)[1][-8:, :8, 0], shown[0, 0].numpy()))
    assert not np.array_equal(*pixels_of(lens.samples))
    until(lambda: not lens.note)
    lens.press("switch", "12")
    assert lens.bend.off == (14,)
    lens.press("undo")
    assert str(lens.bend) == state
    for words, said in (
        ("class=7 layer=3", "Layer 3 is not adapted"),
        ("class=99 layer=13", "class=99"),
        ("layer", "says nothing of a bent class"),
        ("class=7 layer=13 13.frequency.9=1", "13.frequency.9"),
        ("class=7 layer=13 function=kml", "function=kml"),
    ):
        lens.text = words
        assert said in unescape(lens.note), words
        assert str(lens.bend) == state, "what cannot be shown changes nothing"
    lens.press("reset")
    for one in (0, 6):  # a class of task 1 has the neutral numbers
        lens.cls = one
        assert (rank_in(lens) > 1) == (one == 6)


@patch.dict(METHODS)  # taken out again afterwards
@patch.dict(REGISTERED_TEXTS)
def test_a_function_of_the_user_is_looked_at_at_once_trained_by_a_button_and_listed_beside_the_others(house):
    bench = page.Workbench(house.run)
    lens, table = bench.lens, bench.runs

    @function("halved", phase=lambda p: torch.arange(1.0, p + 1))
    def halved(A, B, ponderation, phase):
        """the cosine of half the product, shifted"""
        waves = (phase[..., None, None] + 0.5 * A[:, None, :, None] * B[:, None, None, :]).cos()
        return (ponderation[..., None, None] * waves).mean(1)

    bench.look()
    assert (lens.function, "phase" in lens.sliders, '"halved"' in unescape(table.body)) == ("halved", True, True)
    before, rank = lens.lens.view(lens.bend).F, rank_in(lens)
    assert rank == lens.lens.view(lens.bend).rank > 1
    lens.frequency = [lens.frequency[0] + 1, *lens.frequency[1:]]
    assert not torch.equal(before, lens.lens.view(lens.bend).F)
    until(lambda: "Train with halved" in lens.samples)
    lens.press("train")
    ended(lens)
    assert "samples at step" in lens.seen
    name = Run.of(SMALL.but(method="halved"), house.home).folder.name
    assert name in table.table
    assert name in bench.chosen
    assert set(runs.differences(bench.chosen, house.home).index) == {"method"}
    bench.open(name)
    assert (bench.run.experiment.method, lens.lens.method, lens.function) == ("halved", "halved", "")
    assert bench.opened()[-1] is bench.run


def test_every_function_of_the_lens_has_finite_colours_however_large_it_becomes(house):
    lens = house.bench.lens
    for method in [name for name, method in METHODS.items() if method.matrix]:
        put(lens, cls=7, layer=13, function="" if method == "funlora" else method, spread=0.3)
        view = lens.lens.view(lens.bend)
        colours = pixels_of(lens.picture)[2].reshape(-1, 3)
        assert len(np.unique(colours, axis=0)) > 20, f"{method} is blank: F to {view.F.max():.0f}"
        assert rank_in(lens) == view.rank
    put(lens, function="", spread=0.0)
    few = torch.tensor([[1.0] * 99 + [6045.0]]).double()
    assert layers.reach_of(few + 0.1) < 1


def test_the_unet_shows_every_convolution_and_the_panel_of_a_layer_the_ranks_of_all_classes(house):
    bench, table = house.bench, layers.unet_layers(SMALL)
    lens, panel = bench.lens, bench.layers
    for measure in layers.MEASURES:
        put(lens, cls=7, measure=measure)
        values = lens.lens.adapted.values(measure).loc["7"]
        for i, name in enumerate(table["name"]):
            shown = f"{values[i]:.3g}" if i in values else "not adapted"
            assert re.search(rf"<title>{i}: {re.escape(name)}[^<]* {shown}</title>", lens.unet)
    assert lens.unet.count('role="switch"') == len(lens.lens.adapted.names) == lens.unet.count('data-press="layer"')
    table = layers.unet_layers(preset("cifar10"))
    middle = table.loc[table["part"] == "middle", "size"].tolist()
    assert (len(table), set(table["size"]), middle) == (65, {32, 16, 8, 4}, [4] * 4)
    lens.layer = 20
    before = panel.shown
    lens.layer = 13  # the layer of one is the layer of both
    assert (panel.layer, panel.shown == before) == (13, False)
    for cls in house.run.generator.rows:
        view = panel.adapted.view(cls, 13)
        assert panel.adapted.table(13).loc[house.run.classes[cls], "rank"] == view.rank
        assert f"<td>{view.rank}</td>" in panel.shown
    table = layers.AdaptedLayers(house.other).table(12)
    assert set(table["bound"]) == {2}, "the bound of learned numbers counts the rank and the ratio"
    everything = panel.shown
    panel.compared = panel.compared[:1]
    assert panel.shown != everything


def drawn(panel, view: str, **values) -> list[np.ndarray]:
    """Set the samples panel and return the pictures that it then shows."""
    put(panel, view=view, **values)
    until(lambda: not panel.note and not panel.drawer.moved.is_set())
    panel.draw()
    return pixels_of(panel.pictures)


def test_samples_of_every_solver_are_the_same_after_every_task_in_every_run_and_at_the_end_of_their_path(house):
    from funlora_lab.workbench.samples_panel import CLASSES, MIXED, PATH, RUNS, TASKS

    panel, bare = house.bench.samples, lambda x: ((x + 1) * 127.5).round().clamp(0, 255).byte()
    for name in SOLVERS:
        shown = drawn(panel, CLASSES, picked=[0, 7], count=3, seed=5, solver=name, steps=2)
        for cls, pictures in zip((0, 7), (shown[:3], shown[3:]), strict=True):
            with torch.no_grad():
                velocity, solver = house.run.source(cls).velocity(), Solver(name, 2, SMALL.tolerance)
                expected = bare(solver.integrate(velocity, panel.noise.noise(cls))[0])
            assert all(np.array_equal(one, x[0].numpy()) for one, x in zip(pictures, expected, strict=True))
        assert panel.pictures.count("of 3 recognised") == 2
        assert ('name="steps"' in panel.how) == (not Solver(name).adaptive), "no control that does nothing"
    put(panel, solver="euler", picked=[])
    until(lambda: "No class is chosen" in panel.pictures)
    shown = drawn(panel, TASKS, picked=[0, 6])
    assert len(shown) == 3 + 2  # class 0 is known after 3 tasks, class 6 after 2
    assert all(np.array_equal(*pair) for pair in ((shown[0], shown[1]), (shown[0], shown[2]), (shown[3], shown[4])))
    assert panel.pictures.count("bit-identical") == 2
    forgotten = SameNoise(house.once, 2, Solver("euler", 2)).compare_tasks([0]).html
    assert not np.array_equal(*pixels_of(forgotten)[::2])
    assert ("bit-identical" in forgotten, "not identical" in forgotten) == (False, True), "the badge does not flatter"
    house.bench.runs.chosen = [house.run.run.folder.name, house.other.run.folder.name]
    base, base_too, new, new_too = drawn(panel, RUNS, picked=[0, 8])
    assert np.array_equal(base, base_too), "task 1's classes come from the same base"
    assert not np.array_equal(new, new_too)
    (film,) = drawn(panel, PATH, picked=[7], steps=4)
    for i, image in enumerate(panel.noise.images(7)):
        assert np.array_equal(film[-8:, 9 * i : 9 * i + 8, 0], image[0].numpy())
    assert film.shape[:2] == (8 * images.FRAMES, 9 * panel.count - 1)
    strips = drawn(panel, MIXED, picked=[6, 9])
    assert (len(strips), np.array_equal(*strips[:2]), np.array_equal(strips[1], strips[-1])) == (8, True, False)
    for solver in (Solver(name, 3) for name in ("euler", "midpoint", "rk4")):
        velocity, x0 = house.run.source(7).velocity(), panel.noise.noise(7)
        found, evaluations = solver.integrate(velocity, x0)
        for frames in (0, 5, 4):  # however many states are asked for, a fixed grid ends at the same bits
            states, counted = solver.path(velocity, x0, frames)
            assert torch.equal(states[[0, -1]], torch.stack([x0, found]))
            assert counted == evaluations


def test_a_cell_of_the_confusion_opens_exactly_its_test_images(house):
    panel, run = house.bench.confusion, house.run
    counts = torch.zeros(10, 10, dtype=torch.long)
    counts.index_put_((panel.true, panel.answers), torch.ones_like(panel.true), accumulate=True)
    assert counts.tolist() == run.results["confusion"]
    true, answer = panel.cell
    assert (true != answer, counts[true, answer].item()) == (True, max(counts.fill_diagonal_(0).flatten().tolist()))
    wrong = run.context.dataset.test.pixels[(panel.true == true) & (panel.answers == answer)]
    shown = pixels_of(panel.opened)
    assert np.array_equal(shown[0], wrong[0, 0].numpy())
    assert f"{len(wrong)} test images of class {true}, taken for {answer}" in panel.opened
    assert panel.opened.count("Samples of class") == 2
    panel.cell = [true, true]
    assert panel.opened.count("Samples of class") == 1


def test_the_table_is_filtered_and_sorted_and_compares_what_is_chosen(house):
    panel, name = house.bench.runs, house.run.run.folder.name
    panel.press("refresh")
    assert name in panel.table
    for words, state, found in (("no such", "", []), (f"smoke {name[-8:].upper()}", "", [name]), ("", "running", [])):
        put(panel, words=words, state=state)
        assert panel.frame()["run"].tolist() == found
    put(panel, state="", by="LA", chosen=[name])
    for descending in (False, True):
        panel.descending = descending
        scores = panel.frame()["LA"].dropna().tolist()
        assert scores == sorted(scores, reverse=descending) != scores[:1]
    one = panel.compared
    panel.press("choose", house.other.run.folder.name)
    assert panel.compared != one
    unlike = runs.differences(panel.chosen, house.home)
    assert set(unlike.index) == {"method", "rank", "ratio", "score_after", "adapter_images"}
    assert runs.short_names(unlike) == dict(zip(panel.chosen, ("funlora", "vanilla-mul"), strict=True))
    unlike[panel.chosen[1]] = unlike[panel.chosen[0]].where(unlike.index != "ratio", "2")
    assert set(runs.short_names(unlike).values()) == {"ratio=1", "ratio=2"}, "what suffices"
    assert ">ratio<" in panel.compared
    for kind in runs_panel.CURVES:
        panel.curve = kind
        assert pixels_of(panel.compared)[0].shape[1] > 300
    once = house.once.run.folder.name
    with patch.object(plots, "accuracy_per_task", wraps=plots.accuracy_per_task) as drawn:
        put(panel, curve="accuracy", chosen=[name, once])
    assert drawn.call_args.args[0][""]["fine-tune"] == [None, None, house.once.results["LA"]], "where it was scored"
    panel.chosen = [name]
    panel.seeds = True
    means = sweeps.over_seeds(house.home).set_index("method")
    assert means.loc["funlora", "LA"] == f"{house.run.results['LA']:.4f}"
    assert means.loc["funlora", "LA"] in panel.table
    assert "fine-tune" in panel.table
    panel.words = "smoke-funlora"
    assert means.loc["funlora", "LA"] in panel.table
    assert "fine-tune" not in panel.table
    panel.words = ""
    put(panel, seeds=False, curve="accuracy")


def test_runs_scored_once_of_older_settings_and_damaged_ones_are_listed_and_reported(house, tmp_path):
    never = open_run(SMALL.but(score_after="none", data_root="/a b/$HOME"), "cpu", home=house.home)
    real = open_run(SMALL.but(method="classifier-multitask", score_after="last"), "cpu", home=house.home)
    for one in (house.once, real, never):
        text = report.page(one)
        for words in (text, runs.progress(one.run)[1], repr(page.Workbench(one))):
            assert "not measured" in words
    bench = page.Workbench(real)
    assert all("problem" in getattr(bench, name).body for name in ("lens", "layers", "own_class"))
    assert "draws no images" in bench.samples.pictures
    assert "taken for" in bench.confusion.opened
    assert "trained no classifier" in page.Workbench(never).confusion.body
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


def test_progress_never_falls_and_ends_at_one(house):
    seen, shares = runs.Progress(), []
    for event in house.run.events:
        shares.append(seen.see(event)[0])
    assert (shares == sorted(shares), shares[-1], min(shares)) == (True, 1.0, 0.0)


def test_a_run_is_started_stopped_and_resumed_from_the_panel(house, monkeypatch):
    monkeypatch.setattr(runs_panel, "EVERY", 0.1)
    panel = house.bench.runs
    put(panel, preset="smoke", method="power", seed=0, settings="adapter_imagse=100")
    panel.press("start")
    assert ("did you mean adapter_images" in panel.note, panel.started) == (True, {}), "refused at once"
    panel.settings = "adapter_images=80000 adapter_batch=8 samples_per_class=40"
    panel.press("start")
    ((name, started),) = panel.started.items()
    until(lambda: "adapter of class" in panel.progress, lambda: started.going, started.reason)
    until(lambda: 'alt="adapter-6-0' in panel.progress, lambda: started.going, started.reason)
    assert f"Stop {name}" in panel.acts
    panel.press("stop", name)
    panel.watcher.join(PATIENCE)
    assert (started.going, "resumes" in panel.progress) == (False, True)
    assert runs.table(house.home).set_index("run")["state"][name] == "unfinished"
    assert list((house.home / "artefacts").glob("*/state.safetensors")), "the step it had come to is saved"
    assert f"Resume {name}" in panel.acts, "the button names the run that it acts on"
    panel.press("resume", name)
    again = panel.started[name]
    until(lambda: "step" in panel.progress, lambda: again.going, again.reason)
    panel.press("stop", name)
    panel.watcher.join(PATIENCE)
    assert not again.going


def test_a_chosen_run_that_goes_on_elsewhere_is_watched_until_it_stops(house, monkeypatch):
    monkeypatch.setattr(runs_panel, "EVERY", 0.1)
    panel, record, begun, over = house.bench.runs, Run.of(SMALL.but(seed=7), house.home), Event(), Event()

    def elsewhere():
        with locked(record.folder):
            record.open({"started": "2026-01-01T00:00:00+00:00"})
            record.log({"event": "cluster", "share": 0.25, "seconds": 100.0})
            begun.set()
            over.wait(PATIENCE)

    before, thread, name = panel.chosen, Thread(target=elsewhere), record.folder.name
    thread.start()
    assert begun.wait(PATIENCE)
    panel.chosen = [*before, name]
    until(lambda: f"{name}: A Ray cluster is at work on it. About 5 min remain." in panel.progress)
    assert f"Stop {name}" in panel.acts
    over.set()
    thread.join(PATIENCE)
    panel.watcher.join(PATIENCE)
    assert (panel.watcher.is_alive(), f"Resume {name}" in panel.acts) == (False, True)
    panel.chosen = before
    shutil.rmtree(record.folder)


def cross(shift: int) -> list[bool]:
    lit = {(i, column) for i in range(8) for column in (i, (7 - i + shift) % 8)}
    return [(i // 8, i % 8) in lit for i in range(64)]


def test_a_drawn_class_is_trained_before_ones_eyes_joins_every_panel_and_leaves_as_a_file(house):
    bench = page.Workbench(open_run(SMALL, "cpu", home=house.home))
    panel, run = bench.own_class, bench.run
    joined = (bench.lens, bench.samples, bench.layers)
    before = run.results["accuracy"]
    for shift in range(4):
        panel.pixels = cross(shift)
        panel.press("add")
    assert (len(pixels_of(panel.drawn)), any(panel.pixels)) == (1, False), "the canvas is clear again"
    assert (panel.given().shape, panel.given()[0, 0].bool().sum()) == ((4, 1, 8, 8), 16)
    put(panel, name="cross", images=400)
    panel.press("train")
    ended(panel)
    learned = panel.learned
    assert (set(learned.after), learned.tested) == ({*run.classes, "cross"}, 1)
    assert "1 test image recognised: too few to speak of accuracy" in panel.outcome
    assert learned.before == pytest.approx(run.class_accuracies)
    assert panel.seen.count("samples at step") >= 3
    assert f"loss of the adapter of class {learned.cls}: between" in panel.seen
    assert len(lines_in(panel.seen)) == 1
    looks = pixels_of(panel.seen)
    assert not np.array_equal(looks[0], looks[-2]), "the samples change while the class is learned"
    assert run.results["accuracy"] == before, "the run's results stay"
    (cls,) = (cls for cls, name in run.known.items() if name == "cross")
    assert all(f'value="{cls}">cross<' in one.body for one in joined)
    assert all(torch.equal(v, learned.generator.rows[learned.cls][name]) for name, v in run.row(cls).items())
    bench.samples.picked = [cls]
    until(lambda: "a class of your own" in bench.samples.pictures)
    panel.press("train")
    assert "already knows a class cross" in panel.note
    sent = []
    with patch.object(type(panel), "send", lambda self, content, buffers: sent.append((content["save"], *buffers))):
        panel.press("save", str(cls))
    panel.press("remove", str(cls))
    assert "cross" not in run.known.values()
    assert not any(">cross<" in one.body for one in joined)
    panel.press("restore", str(cls))
    assert (panel.note, run.known[cls], run.removed) == ("", "cross", {})
    panel.press("remove", str(cls))
    assert run.removed == {cls: "cross"}
    ((name, content),) = sent
    assert name.endswith("-cross.safetensors")
    panel.press("upload", name, content)
    assert (panel.note, "cross" in run.known.values()) == ("", True)
    assert all(">cross<" in one.body for one in joined)
    panel.press("upload", "x.safetensors", b"nothing")
    assert "x.safetensors" in panel.note
    assert panel.outcome
    bench.open(house.other.run.folder.name)
    assert not panel.outcome, "it spoke of the run before"


def lines_in(html: str) -> list[np.ndarray]:
    """The points (x, y) of every line of the SVG image inside a piece of HTML."""
    drawn = base64.b64decode(re.search(r'image/svg\+xml;base64,([^"]+)', html)[1]).decode()
    found = re.findall(r'<polyline points="([^"]+)"', drawn)
    return [np.array([point.split(",") for point in line.split()], float) for line in found]


def test_a_training_is_seen_as_samples_from_the_same_noise_beside_the_curves_of_its_losses():
    """The losses of two classes fall and rise; what is shown is drawn seldom, however often a training reports."""
    shown, noise = [], torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    watching, begun = images.Watching(lambda *html: shown.append(html)), time.monotonic()
    for of in ((6, 7), (8, 9)):  # two trainings of the same stage, one after the other
        for step in range(1, 301):
            about = {"event": "loss", "stage": "adapter", "step": step, "steps": 300}
            for cls, loss in zip(of, (400 - step, 10 + step), strict=True):
                watching.report(about | {"class": cls, "loss": loss})
            if step % 100 == 0:
                watching.watch(about | {"classes": list(of), "loss": 1.0}, noise)
        seen = shown[-1][1]
        assert (seen.count("samples at step"), len(pixels_of(seen))) == (3, 3), "those of this training alone"
        assert f"loss of the adapter of class {of[0]}, {of[1]}: between 11 and 399 up to step 300 of 300" in seen
        falls, rises = lines_in(seen)
        assert 50 < len(falls) <= 200
        assert (np.diff(falls[:, 0]) > 0).all()
        assert (np.diff(falls[:, 1]) > 0).all()
        assert (np.diff(rises[:, 1]) < 0).all()
        assert falls[0, 1] < rises[-1, 1] < falls[-1, 1] < rises[0, 1], "399, 310, 102 and 11 on one scale"
    assert len(shown) <= 7 + (time.monotonic() - begun) / images.EVERY
    watching.report({"event": "result"})
    assert shown[-1] == ("", seen), "the bar goes, what was seen stays"


def test_a_training_that_is_stopped_goes_on_where_it_stood(house):
    panel = house.bench.own_class
    panel.drawings = [torch.tensor(cross(shift)).reshape(1, 8, 8).byte() * 255 for shift in (0, 1)]
    put(panel, name="slow cross", images=16_000)

    def train_past(share: float) -> Path:
        """Train until the bar is past a share, stop, and return the file of what was saved."""
        panel.press("train")
        until(lambda: panel.watching.progress.share > share, panel.thread.is_alive, lambda: panel.bar)
        panel.press("stop")
        ended(panel, "Stopped")
        return max((house.home / "artefacts").glob("*/state.safetensors"), key=lambda path: path.stat().st_mtime)

    first = read_tensors(state := train_past(0.0))[1]["step"]
    assert read_tensors(train_past(panel.watching.progress.share))[1]["step"] > first > 0
    steps = [event["step"] for event in read_lines(state.with_name("log.jsonl"))]
    assert steps == sorted(set(steps)), "it went on from where it had stopped"


def test_a_folder_of_pictures_is_read_and_what_cannot_be_learned_refused(house, tmp_path):
    for i, size in enumerate(((8, 8), (30, 20), (9, 40))):
        Image.new("RGB", size, (80 * i, 10, 10)).save(tmp_path / f"{i}.png")
    panel = house.bench.own_class
    panel.folder = str(tmp_path)
    assert panel.given().shape == (3, 1, 8, 8)
    (tmp_path / "9.png").write_text("no picture")
    for folder, words in ((tmp_path, "9.png"), (tmp_path / "missing", "There is no folder")):
        panel.folder = str(folder)
        panel.press("train")
        assert words in panel.note
    panel.folder = ""
    for name, count in (("3", 4), ("", 4), ("mine", 1)):
        with pytest.raises(LabError):
            continual.learn(house.run, name, torch.zeros(count, 1, 8, 8, dtype=torch.uint8))
    moved = continual.shifted(image := torch.randint(0, 255, (2, 1, 8, 8), dtype=torch.uint8))
    assert (moved.shape, torch.equal(moved[:2], image)) == ((18, 1, 8, 8), True)
    assert any(torch.equal(part[..., 1:, :], image[..., :-1, :]) for part in moved.split(2))


def test_the_report_panel_writes_a_page(house):
    panel = house.bench.report
    panel.press("write")
    ended(panel)
    text = panel.path.read_text()
    assert re.search(rf"{house.run.results['LA']:.4f}.*comparisons, nothing changed", text, re.DOTALL)
    assert len(re.findall(r"<td>unchanged</td>", text)) > 20
    assert "Samples after every task" in text
    assert not re.findall(r"(?:src|href)=.http|<script|\{'", text)
    assert "Save a copy" in panel.written
    (row,) = pixels_of(markup.picture(images := torch.randint(0, 255, (3, 1, 8, 8), dtype=torch.uint8), "x"))
    assert row.shape == (8, 26)
    assert np.array_equal(row[:, 9:17], images[1, 0]), "rows of images hold the images"


def test_every_image_has_words_and_every_control_a_name(house):
    for name in page.Workbench.PANELS:
        one = getattr(house.bench, name)
        html = "".join(str(getattr(one, trait)) for trait in one.traits(sync=True) if trait != "_esm")
        for tag in re.findall(r"<img[^>]*>", html):
            assert re.search(r'alt="[^"]+"', tag), tag[:80]
        for tag in re.findall(r"<(?:button|g role)[^>]*>\s*<", html):
            assert "aria-label=" in tag, tag[:200]
        assert "press Run" in repr(one) or "choose Run" in repr(one)


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2 of two colours, #rrggbb or #rgb."""

    def luminance(colour: str) -> float:
        digits = colour.removeprefix("#")
        parts = [int(2 * d if len(digits) == 3 else d, 16) / 255 for d in re.findall("." * (len(digits) // 3), digits)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return high / low


def test_text_and_lines_stand_out_from_both_themes():
    """The colours that the style sheet and the figures use, on the grounds of JupyterLab's light and dark pages."""
    css, colour = (Path(panel.__file__).parent / "panel.css").read_text(), r"(#\w{3,6})\b"
    assert contrast("#fff", "#000") == pytest.approx(21)
    lines = re.findall(rf"(?:outline|border-left|border):\S+ solid {colour}|--edge:{colour}", css)
    lines = {one or other for one, other in lines} | {markup.BLUE, markup.ORANGE, markup.GREY}
    assert len(lines) >= 4
    for line in lines:
        assert min(contrast(line, ground) for ground in ("#fff", "#111", "#212121")) >= 3, line
    grounds = set(re.findall(rf"\.(?:main|halt|good|bad)\{{background:{colour}", css))
    assert len(grounds) == 4
    for ground in grounds:  # of white letters
        assert contrast("#fff", ground) >= 4.5, ground
    lit, unlit = re.findall(rf"\.cells button[^{{]*\{{[^}}]*background:{colour}", css)
    assert contrast(lit, unlit) >= 3
    for line in plots.COLOURS:  # figures lie on white, whatever the theme
        assert contrast(line, "#fff") >= 3, line
    for text in (plots.INK, plots.GREY):
        assert contrast(text, "#fff") >= 4.5, text


def test_only_the_panels_need_jupyter():
    needs = re.compile(
        r"^ *(from|import) (anywidget|traitlets|IPython|funlora_lab\.workbench\.(\w*panel|page)\b)", re.MULTILINE
    )
    for path in Path(layers.__file__).parent.glob("*.py"):
        shows = path.stem in ("page", "panel") or path.stem.endswith("_panel")
        assert bool(needs.search(path.read_text())) <= shows, path
    assert panel.Panel._esm
