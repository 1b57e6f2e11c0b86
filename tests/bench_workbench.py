"""How long a move in the workbench takes: a slider of panel 1, and a grid of 10 classes x 8 images of panel 2.

python tests/bench_workbench.py [PRESET]      over the stored run of PRESET (default: digits)
"""

import statistics
import sys
import time

from funlora_lab import open_run, preset
from funlora_lab.workbench.page import Workbench


def main(name: str) -> None:
    bench = Workbench(open_run(preset(name)))
    functions, moves = bench.functions, []
    for i in range(50):
        functions.ponderations[i % 10].value = i / 10
        moves.append(functions.milliseconds)
    print(
        f"slider move: median {statistics.median(moves):.1f} ms, slowest of 50 {max(moves):.1f} ms (wanted: below 100)"
    )
    samples = bench.samples
    classes = list(bench.run.known)[:10]
    samples.drawer.sheet(classes[:1])  # the judge is read once
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        samples.drawer.sheet(classes)
        times.append(time.perf_counter() - begun)
    print(f"{len(classes)} x 8: median {statistics.median(times):.2f} s, slowest {max(times):.2f} s (wanted: below 2)")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["digits"])
