"""Every bad input ends within seconds in one sentence that names its cause: no traceback, nothing written."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from fault_harness import EXPERIMENT

from funlora_lab import continual
from funlora_lab.__main__ import main
from funlora_lab.config import Experiment
from funlora_lab.store import Run

SECONDS = 5

# words of the command -> what its sentence must name
COMMANDS = [
    ([], "COMMAND"),
    (["nonsense"], "nonsense"),
    (["--nonsense"], "COMMAND"),
    (["run"], "preset"),
    (["run", "smok"], "smok"),
    (["run", "smoke", "digits"], "digits"),
    (["run", "smoke", "--unknown"], "--unknown"),
    (["run", "smoke", "--set"], "--set"),
    (["run", "smoke", "--json=yes"], "--json"),
    (["run", "../smoke"], "../smoke"),
    (["run", "smoke", "--method", "lora-xl"], "method=lora-xl"),
    (["run", "smoke", "--seed", "minus"], "seed=minus"),
    (["run", "smoke", "--seed", "-1"], "seed=-1"),
    (["run", "smoke", "--device", "tpu"], "device=tpu"),
    (["run", "smoke", "--device", "meta"], "device=meta"),
    (["run", "smoke", "--device", ""], "device="),
    (["run", "smoke", "--method", "vanilla-add", "--set", "operation=add"], "operation=add"),
    (["verify"], "run"),
    (["verify", "no-such-run"], "no-such-run"),
    (["verify", "../.."], "../.."),
    (["notebooks"], "preset"),
    (["notebooks", "no-such-preset"], "no-such-preset"),
]
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


def damage_config(change):
    def damage(run: Run) -> None:
        config = json.loads(run.config_file.read_text())
        change(config)
        run.config_file.write_text(json.dumps(config))

    return damage


def artefact(kind: str):
    def damage(run: Run) -> None:
        run.results_file.unlink()
        path = sorted(run.folder.parent.glob(f"artefacts/{kind}-*/*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:-1])

    return damage


# name -> (what is done to a finished run, command: run or verify, what its sentence must name)
FOLDERS = {
    "config is no JSON": (lambda run: run.config_file.write_text("{"), "run", "config.json"),
    "config is a list": (lambda run: run.config_file.write_text("[]"), "run", "config.json"),
    "config is binary": (lambda run: run.config_file.write_bytes(os.urandom(64)), "run", "config.json"),
    "config of another run": (damage_config(lambda c: c["experiment"].update(seed=5)), "run", "seed is 5 there and 0"),
    "config of another format": (damage_config(lambda c: c.update(format=99)), "run", "99"),
    "config to verify is no JSON": (lambda run: run.config_file.write_text("{"), "verify", "config.json"),
    "unknown field to verify": (damage_config(lambda c: c["experiment"].update(exec=1)), "verify", "exec"),
    "wrong kind to verify": (damage_config(lambda c: c["experiment"].update(split=3)), "verify", "config.json"),
    "bad value to verify": (damage_config(lambda c: c["experiment"].update(solver="x")), "verify", "solver=x"),
    "log is binary": (lambda run: run.log_file.write_bytes(b"\x80\n"), "verify", "metrics.jsonl"),
    "log of lists": (lambda run: run.log_file.write_text("[]\n"), "run", "metrics.jsonl"),
    "log is empty": (lambda run: run.log_file.write_text(""), "verify", "no certificates"),
    "results are no JSON": (lambda run: run.results_file.write_text("LA"), "run", "results.json"),
    "results of something else": (lambda run: run.results_file.write_text("{}"), "run", "results.json"),
    "network cut short": (artefact("network"), "run", "network-"),
    "adapter cut short": (artefact("adapter"), "run", "adapter-"),
    "samples cut short": (artefact("samples"), "run", "samples-"),
    "classifier cut short": (artefact("classifier"), "run", "classifier-"),
}


def settings_of(experiment: Experiment) -> list[str]:
    """The words that turn the preset smoke into ``experiment``."""
    words = []
    for key, value in vars(experiment).items():
        if key != "preset":
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += ["--set", f"{key}={text}"]
    return words


def contents(folder):
    """Every file but the empty ones that serve as locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def refused(words, capsys) -> str:
    """Run the command; it must fail in time with a sentence, which is returned."""
    begun = time.process_time()  # of this process alone: others may keep the machine busy
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert time.process_time() - begun < SECONDS
    assert status == 2
    assert printed.out == ""
    assert "Traceback" not in printed.err
    sentence = printed.err.strip().splitlines()[-1].split("\r")[-1]
    assert sentence.startswith("funlora")
    return sentence


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("finished")
    for _ in continual.run(EXPERIMENT, home=home):
        pass
    return home


@pytest.mark.parametrize(("words", "cause"), COMMANDS, ids=lambda value: " ".join(value) if value else "nothing")
def test_bad_commands(words, cause, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FUNLORA_HOME", str(tmp_path))
    assert cause in refused(words, capsys)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("word", SETTINGS)
def test_bad_settings(word, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FUNLORA_HOME", str(tmp_path))
    sentence = refused(["run", "smoke", "--set", word], capsys)
    assert word.partition("=")[0] in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folders(case, finished, capsys, tmp_path, monkeypatch):
    damage, command, cause = FOLDERS[case]
    home = shutil.copytree(finished, tmp_path / "home")
    monkeypatch.setenv("FUNLORA_HOME", str(home))
    run = Run.of(EXPERIMENT, home)
    damage(run)
    before = contents(home)
    words = ["verify", run.folder.name] if command == "verify" else ["run", "smoke", *settings_of(EXPERIMENT)]
    assert cause in refused(words, capsys)
    after = contents(home)
    assert {path for path in before if before[path] != after.get(path)} <= {run.log_file, run.config_file}
    assert after.keys() - before.keys() == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys):
    assert "no CUDA device is available" in refused(["run", "smoke", "--device", "cuda"], capsys)


def test_a_bad_patience_in_the_environment(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FUNLORA_HOME", str(tmp_path))
    monkeypatch.setenv("FUNLORA_SAVE_SECONDS", "often")
    assert "FUNLORA_SAVE_SECONDS=often" in refused(["run", "smoke"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_there_are_at_least_sixty():
    assert len(COMMANDS) + len(SETTINGS) + len(FOLDERS) >= 60


@pytest.mark.parametrize("words", [["run", "smoke", "--set", "seed=x"], ["verify", "nowhere"]])
def test_the_real_command_says_the_same(words, tmp_path):
    environment = {**os.environ, "FUNLORA_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "funlora_lab", *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("funlora: ")
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
