"""The README: its script runs as it stands, and its results are those of the stored files, all of them."""

import re
import subprocess
import sys

import pytest
import readme_tables

README = readme_tables.README.read_text()


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


def test_every_result_is_that_of_the_stored_files():
    """`python tests/readme_tables.py` writes the blocks anew."""
    assert readme_tables.written(README) == README
    assert {name for name, _ in readme_tables.BLOCK.findall(README)} == set(readme_tables.BLOCKS)


def test_a_changed_number_is_noticed_and_mended():
    changed = README.replace("| fine-tune | 0.", "| fine-tune | 0.9", 1)
    assert changed != README
    assert readme_tables.written(changed) == README


def test_no_result_stands_outside_the_blocks():
    """Sentences beside them hold no decimals and no shares, but the versions of Python; results hold nothing else."""
    no_results = r"```.*?```|`[^`]*`|\]\([^)]*\)|Sec\. [\d.]+"
    rest = readme_tables.BLOCK.sub("", re.sub(no_results, "", README, flags=re.DOTALL))
    assert set(re.findall(r"\d+\.\d+|\d+ ?%", rest)) <= {"3.11", "3.12"}
    (shown,) = re.findall(r"\n## What it shows\n(.*?)\n## ", rest, re.DOTALL)
    assert set(re.findall(r"\d+", shown)) <= {"8"}  # the size of digits


def test_a_table_that_lost_a_row_is_named():
    with pytest.raises(SystemExit, match=r"03-ranks.csv has no row 'sawtooth' with a column 'max'"):
        readme_tables.Table("03-ranks").of("sawtooth", "max")
