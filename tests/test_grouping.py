"""A class learns the same adapter wherever it stands in the order, whoever is trained beside it, in any process."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from fault_harness import EXPERIMENT
from hypothesis import given, settings
from hypothesis import strategies as st

from funlora_lab.disk import fingerprint
from funlora_lab.grouping import adapters_of, difference, grouping_table

TINY = EXPERIMENT.but(split="6-4")  # task 2 brings the classes 6 to 9
TOLERANCE = 1e-4  # between groups of different sizes, whose sums are rounded differently


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the base, size of the group and class -> the adapter first seen so)."""
    home = tmp_path_factory.mktemp("reference")
    return home, {(4, cls): row for cls, row in adapters_of(TINY, home).items()}


@settings(max_examples=5, deadline=None, derandomize=True)
@given(later=st.permutations([6, 7, 8, 9]), lanes=st.integers(1, 4), later_tasks=st.sampled_from([1, 2, 4]))
def test_order_and_grouping_do_not_matter(trained, later, lanes, later_tasks):
    base, seen = trained
    order = ",".join(map(str, [*range(6), *later]))
    with tempfile.TemporaryDirectory() as home:
        for network in base.glob("artefacts/network-*"):
            shutil.copytree(network, Path(home) / "artefacts" / network.name)
        rows = adapters_of(TINY.but(class_order=order, lanes=lanes, split=f"6-{4 // later_tasks}"), Path(home))
        per_task = 4 // later_tasks  # more lanes than that are filled with the classes of the tasks that follow
        together = [later] if lanes > per_task else [later[i : i + per_task] for i in range(0, 4, per_task)]
        groups = [part[i : i + lanes] for part in together for i in range(0, len(part), lanes)]
        sizes = {cls: len(group) for group in groups for cls in group}
    for cls, row in rows.items():
        assert fingerprint(row) == fingerprint(seen.setdefault((sizes[cls], cls), row))
        assert difference(row, seen[4, cls]) < TOLERANCE


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
    printed = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, env=os.environ)
    _, seen = trained
    assert printed.stdout.split() == [fingerprint(seen[4, cls]) for cls in (6, 7, 8, 9)], printed.stderr


def test_the_table_of_groupings():
    variants = {"another order": {"class_order": "0,1,2,3,4,5,9,8,7,6"}, "one by one": {"lanes": 1}}
    table = grouping_table(TINY, variants)
    assert table.loc["another order", "bit-identical"] == 4
    assert table.loc["another order", "largest difference"] == 0
    assert 0 <= table.loc["one by one", "largest difference"] < TOLERANCE
