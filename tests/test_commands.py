"""The command: a user's own file, the list, progress as it is shown, and how a call ends."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from funlora_lab import commands, preset
from funlora_lab.__main__ import main
from funlora_lab.adapters import METHODS
from funlora_lab.commands import closing_table
from funlora_lab.experiment import REGISTERED_TEXTS
from funlora_lab.store import Run
from funlora_lab.workbench.progress import Progress

MINE = """
import torch
import my_constants
from funlora_lab import function

@function("sawtooth", rate=3e-2, about="a sum of sawtooths", frequency=lambda p: torch.arange(1.0, p + 1))
def sawtooth(A, B, ponderation, frequency):
    angle = A[:, :, None, None] * B[:, None, :, None] * frequency[:, None, None]
    return (ponderation[:, None, None] * (1 + angle - angle.detach().round())).sum(3)
"""
SHORT = "base_images=64 adapter_images=32 samples_per_class=4 chunk=4 classifier_epochs=1 split=8-2".split()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file that registers a method, beside a module that it imports."""
    (tmp_path / "my_constants.py").write_text("")
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path / "mine.py"
    METHODS.pop("sawtooth", None)
    REGISTERED_TEXTS.pop("sawtooth", None)


def test_a_function_of_a_file_of_ones_own_is_trained_certified_and_listed(mine, capsys):
    words = [f"--set={setting}" for setting in SHORT]
    assert main(["run", "smoke", "--device", "cpu", "--method", "sawtooth", *words, "--json", "--with", str(mine)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["PPC"] > 0
    del METHODS["sawtooth"], REGISTERED_TEXTS["sawtooth"]
    assert main(["run", "smoke", "--method", "sawtooth", *words]) == 2
    assert "method=sawtooth" in capsys.readouterr().err
    assert main(["verify", result["run"], "--with", str(mine)]) == 0
    assert (
        main(["export", result["run"], "--class", "9", "--to", str(mine.with_suffix(".st")), "--with", str(mine)]) == 0
    )
    assert main(["list", "--with", str(mine)]) == 0
    assert re.search(r"sawtooth +a sum of sawtooths", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1\nraise ValueError('two\\nlines')", "mine.py, line 2: ValueError two lines"),
        ("def f(:", "mine.py: SyntaxError"),
        ("import sys\nsys.exit(0)", "mine.py, line 2: SystemExit 0"),
        ("from funlora_lab import function\n@function('power')\ndef f(A, B): ...", "line 2: LabError The method power"),
    ],
)
def test_a_file_that_does_not_run_ends_in_one_sentence(mine, text, sentence, capsys):
    mine.write_text(text)
    assert main(["list", "--with", str(mine)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert sentence in said


def test_the_list_goes_on_past_a_damaged_run(smoke_home, tmp_path, monkeypatch, capsys):
    home = shutil.copytree(smoke_home, tmp_path / "copy")
    monkeypatch.setenv("FUNLORA_HOME", str(home))
    run = Run.of(preset("smoke"), home)
    for name in ("damaged", "unfinished"):
        shutil.copytree(run.folder, home / name)
    (home / "damaged" / "results.json").write_text("{")
    (home / "unfinished" / "results.json").unlink()
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"damaged +damaged\n", said)
    assert re.search(r"unfinished +unfinished\n?", said)
    assert re.search(rf"{run.folder.name} +LA 0\.\d+  AIA 0\.\d+", said)
    for known in ("vanilla-add ", "self-replay ", "dopri5-each ", "cifar100 ", "base_images "):
        assert f"\n{known}" in said


def test_what_was_not_measured_is_said_in_words(smoke_home):
    results = Run.of(preset("smoke"), smoke_home).results()
    shown = closing_table(results | {"AIA": None, "flow_loss": None})
    assert re.search(r"^AIA +not measured ", shown, re.M)
    assert re.search(r"^flow loss +not measured ", shown, re.M)
    assert re.search(r"^LA +0\.\d{4} ", shown, re.M)


def shown_by(*events):
    stream = io.StringIO()
    progress = Progress(stream)
    for event in events:
        progress(event)
    progress.close()
    return stream.getvalue()


def test_the_first_report_of_a_stage_shows_its_true_speed():
    loss = {"event": "loss", "stage": "base", "loss": 1.0, "steps": 400, "images": 0}
    shown = shown_by({**loss, "step": 100, "seconds": 50.0})
    assert "100/400 [00:50<02:30,  2.00it/s" in shown
    assert "0/400 [00:00" not in shown, "a bar without a speed came first"
    resumed = shown_by({**loss, "step": 50, "seconds": 1.0, "replayed": True}, {**loss, "step": 100, "seconds": 25.0})
    assert "4.00it/s" in resumed
    assert "50/400" not in resumed


def test_a_bar_serves_classes_side_by_side_and_begins_anew_with_the_next():
    loss = {"event": "loss", "stage": "adapter", "steps": 40, "images": 0, "seconds": 5.0}
    events = [{**loss, "class": cls, "step": step, "loss": 1.0} for step in (10, 20) for cls in (6, 7)]
    shown = shown_by(*events, {**loss, "class": 8, "step": 10, "loss": 2.0})
    assert shown.count("adapters:") == 2, "drawn more often than anybody can see"
    assert re.search(r"10/40 \[00:05<00:1[56],  (2\.00|1\.9\d)it/s, class 8, loss 2\.0000", shown)
    accuracy = {"event": "accuracy", "task": 2, "of": 3, "average": 0.5, "per_task": [0.25, 0.75]}
    assert shown_by(accuracy) == "task 2/3: accuracy 0.5000 (by task: 0.250 0.750)\n"


def test_ctrl_c_saves_and_says_so(tmp_path):
    command = [sys.executable, "-m", "funlora_lab", "run", "digits", "--device", "cpu"]
    environment = os.environ | {"FUNLORA_HOME": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # its first line comes when work begins
        if "tasks:" in line:
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "funlora: Asked to stop; everything is saved" in said
    assert "Traceback" not in said


def test_a_second_ctrl_c_ends_with_status_130_and_one_sentence(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "listing", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "funlora: interrupted; the same command resumes the run.\n"


def test_help_comes_without_torch():
    code = "import sys, funlora_lab.__main__ as m; m._parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
