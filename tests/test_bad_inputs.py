"""Every bad input ends within seconds in one sentence that names its cause: no traceback, nothing written."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch
from fault_harness import EXPERIMENT

from funlora_lab import continual, preset
from funlora_lab.__main__ import main
from funlora_lab.experiment import shown
from funlora_lab.store import Run

SECONDS = 5
SET = " ".join(f"--set {name}={shown(value)}" for name, value in EXPERIMENT.unlike(preset("smoke")).items())
RUN = f"run smoke {SET}"
NAME = Run.of(EXPERIMENT).folder.name
VERIFY = f"verify {NAME}"

# words of the command : what its sentence must name
COMMANDS = """
 : COMMAND
nonsense : nonsense
--nonsense : COMMAND
run : preset
run smok : smok
run smoke digits : digits
run smoke --unknown : --unknown
run smoke --set : --set
run smoke --json=yes : --json
run ../smoke : ../smoke
run smoke --method lora-xl : method=lora-xl
run smoke --method vanilla-add --set operation=add : operation=add
run smoke --seed minus : seed=minus
run smoke --seed -1 : seed=-1
run smoke --device tpu : device=tpu
run smoke --device meta : device=meta
run smoke --device '' : device=
run smoke --device cuda:99 : device=cuda:99
run smoke --minutes 0 : --minutes
run smoke --minutes -1 : --minutes
run smoke --minutes nan : --minutes
run smoke --minutes inf : --minutes
run smoke --minutes soon : --minutes
run smoke --with nowhere.py : nowhere.py
run smoke --with . : .
run smoke --classes 6:8 : --classes
run smoke --worker 1/2 : --worker
merge somewhere : merge
verify : RUN
verify no-such-run : no-such-run
verify ../.. : ../..
export no-such-run --class 7 : no-such-run
export no-such-run : --class
quality no-such-run --draws 0 : --draws
report no-such-run : no-such-run
sweep smoke --seeds 0 : --seeds
sweep smoke --seeds 1.5 : --seeds
sweep smoke --tables nonsense : nonsense
bench smoke --batch 0 : --batch
ledger no-such-preset : no-such-preset
notebooks : preset
notebooks no-such-preset : no-such-preset
"""
SETTINGS = """
seed seed= =3 seed=1.5 seed=nan sed=1 preset=digits
operation=sub start=zero functions=0 functions=two ratio=0 ratio=3 ratio=-1
window=11 window=23-11 window=0-99 window=a-b window=-1-3 label_embedding=none
split=2 split=0-2 split=3-3 split=11-1 split=2-2-2 split=-2-2
class_order=random class_order=0,1,2 class_order=0,0,1,2,3,4,5,6,7,8 class_order=shuffled-x
data=mnist data=../digits image_size=9 image_size=16 channels=3 channels=0
base_channels=0 multipliers= multipliers=0 multipliers=1,x attention=a head_channels=0 head_channels=7 norm_groups=0
dropout=1 dropout=-0.1 dropout=nan precision=fp16 valid_fraction=1 valid_fraction=0.999 flip=maybe
base_images=0 base_batch=-4 base_lr=0 base_lr=nan base_lr=inf base_lr=fast base_schedule=linear base_warmup=-1
base_ema=1 base_ema_start=-1 grad_clip=0
adapter_images=0 adapter_lr=-1 adapter_batch=0 adapter_schedule=step adapter_ema=2 lanes=-1
solver=heun steps=0 steps=2.5 tolerance=0 samples_per_class=0 chunk=0
classifier=vit classifier_epochs=0 classifier_batch=0 classifier_lr=0 classifier_momentum=1
classifier_weight_decay=-1 crop=8 crop=-1 log_every=0
""".split()


def config(change):
    def damage(run: Run) -> None:
        stored = json.loads(run.config_file.read_text())
        change(stored)
        run.config_file.write_text(json.dumps(stored))

    return damage


def artefact(kind: str):
    def damage(run: Run) -> None:
        run.results_file.unlink()
        path = sorted(run.folder.parent.glob(f"artefacts/{kind}-*/*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:-1])

    return damage


# what is done to a finished run -> (words of the command, what its sentence must name)
FOLDERS = {
    "config is no JSON": (lambda run: run.config_file.write_text("{"), RUN, "config.json"),
    "config is a list": (lambda run: run.config_file.write_text("[]"), RUN, "config.json"),
    "config is binary": (lambda run: run.config_file.write_bytes(os.urandom(64)), RUN, "config.json"),
    "config of another run": (config(lambda c: c["experiment"].update(seed=5)), RUN, "seed is 5 there and 0"),
    "config of another format": (config(lambda c: c.update(format=99)), RUN, "99"),
    "config to verify is no JSON": (lambda run: run.config_file.write_text("{"), VERIFY, "config.json"),
    "unknown setting to verify": (config(lambda c: c["experiment"].update(exec=1)), VERIFY, "exec"),
    "wrong kind to verify": (config(lambda c: c["experiment"].update(split=3)), VERIFY, "config.json"),
    "bad value to verify": (config(lambda c: c["experiment"].update(functions=0)), VERIFY, "functions=0"),
    "log is binary": (lambda run: run.log_file.write_bytes(b"\x80\n"), VERIFY, "metrics.jsonl"),
    "log of lists": (lambda run: run.log_file.write_text("[]\n"), RUN, "metrics.jsonl"),
    "log is empty": (lambda run: run.log_file.write_text(""), VERIFY, "no certificates"),
    "results are no JSON": (lambda run: run.results_file.write_text("LA"), RUN, "results.json"),
    "results of something else": (lambda run: run.results_file.write_text("{}"), RUN, "results.json"),
    "network cut short": (artefact("network"), RUN, "network-"),
    "adapter cut short": (artefact("adapter"), RUN, "adapter-"),
    "samples cut short": (artefact("samples"), RUN, "samples-"),
    "classifier cut short": (artefact("classifier"), RUN, "classifier-"),
    "a class nobody learned": (lambda run: None, f"export {NAME} --class 12", "class=12"),
    "a class of the base": (lambda run: None, f"remove {NAME} --class 3", "class=3"),
    "no class file": (lambda run: None, f"import {NAME} nowhere.safetensors", "nowhere.safetensors"),
}
LINES = [line.partition(" : ") for line in COMMANDS.strip("\n").splitlines()]
CASES = {words or "nothing": (None, words, cause) for words, _, cause in LINES}
CASES |= {f"--set {word}": (None, f"run smoke --set {word}", word.partition("=")[0]) for word in SETTINGS} | FOLDERS


def contents(folder):
    """Every file but the empty ones that serve as locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("finished")
    continual.run(EXPERIMENT, home=home)
    return home


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_ends_in_one_sentence(case, finished, capsys, tmp_path, monkeypatch):
    damage, words, cause = CASES[case]
    home = tmp_path / "home"
    monkeypatch.setenv("FUNLORA_HOME", str(home))
    run = Run.of(EXPERIMENT, home)
    if damage:
        shutil.copytree(finished, home)
        damage(run)
    before, begun = contents(tmp_path), time.process_time()  # of this process alone: others may keep the machine busy
    try:
        status = main(shlex.split(words))
    except SystemExit as end:
        status = end.code
    assert time.process_time() - begun < SECONDS
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert "Traceback" not in printed.err
    sentence = printed.err.strip().splitlines()[-1].split("\r")[-1]
    assert sentence.startswith("funlora")
    assert cause in sentence
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert {path for path in before if before[path] != after[path]} <= {run.log_file, run.config_file}


def test_there_are_at_least_sixty():
    assert len(CASES) >= 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys):
    assert main(["run", "smoke", "--device", "cuda"]) == 2
    assert "no such CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["FUNLORA_SAVE_SECONDS=often", "FUNLORA_WITHOUT=speed"])
def test_bad_words_in_the_environment(word, capsys, monkeypatch):
    monkeypatch.setenv(*word.split("="))
    assert main(["run", "smoke"]) == 2
    assert f"{word}: accepted" in capsys.readouterr().err


def test_the_real_command_says_the_same(tmp_path):
    command = [sys.executable, "-m", "funlora_lab", "run", "smoke", "--set", "seed=x"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"FUNLORA_HOME": str(tmp_path)})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("funlora: ")
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
