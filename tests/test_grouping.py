"""A class learns the same adapter wherever it stands in the order, whoever is trained beside it, in any process."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funlora_lab import preset
from funlora_lab.continual import prepare
from funlora_lab.store import fingerprint
from funlora_lab.training import Runtime

TINY = preset("smoke").but(  # task 2 brings the classes 6 to 9
    split="6-4", multipliers=(1,), window="4-7", dropout=0.1, base_images=128, adapter_images=64
)
TOLERANCE = 1e-4  # between groups of different sizes, whose sums are rounded differently


def adapters_of(experiment, home, base=None) -> dict:
    """Train only the base (or take it from the home ``base``) and the adapters: class -> row."""
    for network in (base / "artefacts").glob("network-*") if base else ():
        shutil.copytree(network, home / "artefacts" / network.name)
    context, generator = prepare(experiment, Runtime(), home)
    for task in range(len(context.tasks)):
        generator.learn(task)
    return generator.rows


def difference(a, b) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(home of the base, (size of the group, class) -> the adapter first seen so)."""
    home = tmp_path_factory.mktemp("reference")
    return home, {(4, cls): row for cls, row in adapters_of(TINY, home).items()}


@settings(max_examples=5, deadline=None, derandomize=True)
@given(later=st.permutations([6, 7, 8, 9]), lanes=st.integers(1, 4), later_tasks=st.sampled_from([1, 2, 4]))
def test_order_and_grouping_do_not_matter(trained, later, lanes, later_tasks):
    base, seen = trained
    order, per_task = ",".join(map(str, [*range(6), *later])), 4 // later_tasks
    with tempfile.TemporaryDirectory() as home:
        rows = adapters_of(TINY.but(class_order=order, lanes=lanes, split=f"6-{per_task}"), Path(home), base)
    # more lanes than a task has classes are filled with the classes of the tasks that follow
    together = [later] if lanes > per_task else [later[i : i + per_task] for i in range(0, 4, per_task)]
    groups = [part[i : i + lanes] for part in together for i in range(0, len(part), lanes)]
    sizes = {cls: len(group) for group in groups for cls in group}
    assert rows.keys() == sizes.keys()
    for cls, row in rows.items():
        assert fingerprint(row) == fingerprint(seen.setdefault((sizes[cls], cls), row))
        assert difference(row, seen[4, cls]) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "bound"),
    [({"class_order": "0,1,2,3,4,5,9,8,7,6"}, 0), ({"split": "6-1", "lanes": 4}, 0), ({"lanes": 1}, TOLERANCE)],
)
def test_how_far_each_grouping_goes_from_the_reference(trained, changes, bound, tmp_path):
    base, seen = trained
    rows = adapters_of(TINY.but(**changes), tmp_path, base)
    assert max(difference(row, seen[4, cls]) for cls, row in rows.items()) <= bound
    assert len(list(tmp_path.glob("artefacts/network-*"))) == 1  # all over the same base


def test_another_process_learns_the_same_bits(trained, tmp_path):
    program = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(int(sys.argv[3]))
from test_grouping import TINY, adapters_of, fingerprint
print(*(fingerprint(row) for row in adapters_of(TINY, Path(sys.argv[1])).values()))
"""
    words = [tmp_path, Path(__file__).parent, str(torch.get_num_threads())]
    printed = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert printed.stdout.split() == [fingerprint(trained[1][4, cls]) for cls in (6, 7, 8, 9)], printed.stderr
