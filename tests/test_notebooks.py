"""The notebooks: clean as committed, executed headless, reproducible, and true."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from PIL import Image

from funlora_lab import LabError
from funlora_lab.presets import configured
from funlora_lab.studies import keep, notebooks, published, sweeps, tables

FOLDER = notebooks.folder()
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
names = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def nbval(paths: list[Path], home: Path) -> subprocess.CompletedProcess:
    """Execute notebooks as they are and compare whole numbers and words with the outputs they carry.

    Their threads sleep while they wait: spinning beside another busy test they took six times as long.
    """
    threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "PASSIVE"}
    environment = os.environ | {"FUNLORA_HOME": str(home)} | threads
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", *map(str, paths)]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=1500)


@names
def test_committed_notebook_is_clean_and_short(notebook):
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    assert not {"widgets", "papermill"} & set(book.metadata)
    cells = code_cells(notebook)
    assert len(cells) <= 13
    for cell in cells:
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert "papermill" not in cell.metadata
        assert not any(output.output_type == "error" for output in cell.outputs)
        assert cell.execution_count or not cell.outputs, "nbval takes outputs without a count for those of another cell"
        tree = ast.parse(cell.source)
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
        stars = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        assert not any(alias.name == "*" for node in stars for alias in node.names)
        assert "sys.path" not in cell.source
    assert any(cell.outputs for cell in cells), "committed notebooks keep their outputs"
    titles = [cell.source for cell in book.cells]  # the workbench ends at its panels: its checks stand before them
    assert "Checks" in (titles[-2] if cells[-1].source != "bench.report" else cells[1].source)


@names
def test_parameters_are_annotated_literals_with_a_comment_and_a_preset_among_them(notebook):
    (tagged,) = (cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", []))
    parameters = papermill.inspect_notebook(str(notebook))
    assert len(parameters) == len(tagged.source.splitlines())
    assert ast.literal_eval(parameters["preset"]["default"]) == "digits"
    for parameter in parameters.values():
        kind = notebooks.TYPES[parameter["inferred_type_name"]]
        assert type(ast.literal_eval(parameter["default"])) is kind
        assert parameter["help"]


@pytest.fixture(scope="module")
def smoke_copies(tmp_path_factory):
    """Every notebook executed by papermill for the smoke preset, all in one home."""
    home = tmp_path_factory.mktemp("notebooks-home")
    before = {name: os.environ.get(name) for name in ("FUNLORA_HOME", "FUNLORA_FIGURES")}
    os.environ.update(FUNLORA_HOME=str(home), FUNLORA_FIGURES=str(home / "figures"))
    try:
        copies = notebooks.execute("smoke", ["seeds=1", "settings=adapter_images=32 classifier_epochs=1"])
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return home, copies


def test_every_notebook_runs_headless(smoke_copies):
    _, copies = smoke_copies
    assert [copy.name for copy in copies] == [notebook.name for notebook in NOTEBOOKS]


def test_what_is_trained_in_a_notebook_is_shown_and_leaves_no_bar(smoke_copies):
    (copy,) = (copy for copy in smoke_copies[1] if copy.name.startswith("01_"))
    cell = code_cells(copy)[2]  # after the parameters and those that were given
    shown = [output["data"]["text/html"] for output in cell.outputs if "data" in output]
    assert len(shown) == 4, "one for every method that no notebook before has trained"
    assert sum("in training: samples from the same noise" in html for html in shown) == 3, "all that draw"
    assert not any("<progress" in html for html in shown)


def test_every_figure_says_in_words_what_it_shows(smoke_copies):
    outputs = [output for copy in smoke_copies[1] for cell in code_cells(copy) for output in cell.outputs]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) > 15
    assert all(len(output.metadata["image/png"]["alt"]) > 5 for output in figures)


@pytest.mark.heavy
def test_a_second_execution_gives_the_same_numbers(smoke_copies):
    home, copies = smoke_copies
    again = nbval(copies, home)
    assert again.returncode == 0, again.stdout[-3000:]


TOY = (  # the paper's cifar100, its split and protocol, with a network and a budget that teach nothing
    "data=folder data_root={} image_size=4 base_channels=4 multipliers=1 res_blocks=1 attention= norm_groups=2 "
    "window=0-13 lora_v1_window=4-5 lora_v2_window=4-6 functions=2 lanes=80 "
    "base_images=64 base_batch=16 base_lr=1e-2 base_warmup=0 adapter_images=1 adapter_batch=1 "
    "solver=euler steps=1 denoising_steps=2 samples_per_class=4 chunk=4 "
    "classifier=cnn classifier_epochs=1 classifier_batch=500 crop=1 score_after=last"
)


@pytest.mark.heavy
def test_the_tables_of_the_papers_benchmark_run_with_nothing_held_out(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 1)):
        for cls in range(100):
            (folder := tmp_path / "data" / part / f"{cls:02}").mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    settings = TOY.format(tmp_path / "data")
    e = configured("cifar100", settings)
    assert (e.split, e.valid_fraction) == ("20-20", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # here and now, which spares every notebook its processes
    sweeps.perform(tables.cells(list(tables.TABLES), e, [0]), "cpu")
    few = {"05": ["repeats=1", "fixed=rk4 2, rk4 3", "dear=rk4 3", "multiples=1, 2"], "07": ["draws=2", "shown=2"]}
    for number in ("02", "03", "04", "05", "06", "07"):
        own = settings.removesuffix(" score_after=last") if number == "07" else settings  # which shows every task
        parameters = [f"settings={own}", *few.get(number, ["seeds=1"])]
        (copy,) = notebooks.execute("cifar100", parameters, f"{number}_")
        said = " ".join(str(cell.outputs) for cell in code_cells(copy))
        if number in ("02", "03", "06"):
            assert "Nothing is held out" in said
            assert "rates are those chosen on digits" in said
    kept = keep.folder(e)
    windows = pd.read_csv(kept / "02-windows.csv")
    assert windows["flow loss"].isna().all()
    assert windows["LA %"].notna().all()
    checked = pd.read_csv(kept / "06-checklist.csv")
    assert len(checked) == len(list(published.layout()))


@pytest.mark.heavy
def test_the_committed_continual_training_holds_on_digits(tmp_path):
    """From an empty home: trains the digits run, its bounds and fine-tuning, and compares with what is committed."""
    done = nbval([FOLDER / "01_continual_training.ipynb"], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("preset", "settings", "only", "words"),
    [
        ("nosuch", [], None, "Unknown preset 'nosuch'"),
        ("smoke", ["nosuch=1"], None, "No notebook has a parameter 'nosuch'"),
        ("smoke", ["seed"], None, "write it as name=value"),
        ("smoke", ["seed=abc"], None, "seed=abc: accepted is a whole number"),
        ("smoke", ["seed=__import__('os').system('x')"], None, "accepted is a whole number"),
        ("smoke", ["seed=1"], "nosuch", "No notebook's name contains 'nosuch'"),
    ],
)
def test_bad_parameters_are_refused_before_anything_runs(preset, settings, only, words, tmp_path):
    with pytest.raises(LabError) as refusal:
        notebooks.execute(preset, settings, only)
    assert words in str(refusal.value)
    assert not (tmp_path / "home").exists()


def test_values_become_the_type_of_the_parameter_and_text_that_looks_like_code_stays_text():
    word, (path,) = '"); import os; os.abort()  # ', FOLDER.glob("03_*")
    chosen = notebooks.assign([path], "smoke", [f"device={word}", "seeds=2", "tolerance=1e-3"])
    assert chosen == {path: {"preset": "smoke", "device": word, "seeds": 2, "tolerance": 1e-3}}
    with notebooks.environment() as variables:
        assert Path(variables["FUNLORA_HOME"]).is_absolute(), "kernels work in another folder"
