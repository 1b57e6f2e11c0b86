"""The README: its script runs as it stands, and its numbers stand in the stored files that it names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from funlora_lab.adapters import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_script_trains_draws_and_scores(tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(script.splitlines()) <= 40
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"funlora +LA 0\.\d+ +AIA 0\.\d+ +520 numbers a class +nothing forgotten", lines[0])
    assert lines[1].startswith("sawtooth")
    assert lines[1].endswith("nothing forgotten")
    assert lines[2].startswith("fine-tune")
    assert lines[2].endswith("old classes changed")
    assert (tmp_path / "nine.safetensors").stat().st_size > 2000


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@pytest.mark.parametrize("preset", ["digits", "cifar10-tiny"])
def test_the_table_of_methods_is_that_of_the_stored_results(preset):
    for r in json.loads((ROOT / "figures" / preset / "results.json").read_text())["01 seed 0"]:
        size = f"{r['PPC']:,}" if r["method"] in METHODS else "all weights"
        scores = " | ".join(shown(r[name]) for name in ("LA", "AIA"))
        rest = " | ".join(shown(r[name]) for name in ("recognition", "flow_loss"))
        assert f"| {r['method']} | {scores} | {size} | {rest} |" in README


ROWS = [line for line in README.splitlines() if line.startswith("|") and re.search(r"\(figures/[^)]*\.md\)", line)]


@pytest.mark.parametrize("row", ROWS)
def test_every_number_of_a_finding_stands_in_the_file_it_names(row):
    (path,) = re.findall(r"\((figures/[^)]*\.md)\)", row)
    stored = (ROOT / path).read_text()
    finding = row.split("|")[2]
    numbers = re.findall(r"\d+(?:\.\d+)?", finding)
    assert numbers
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", stored), (number, path)


def test_findings_are_tabulated():
    assert len(ROWS) >= 6
