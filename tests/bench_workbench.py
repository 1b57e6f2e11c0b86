"""How long a slider move of the lens takes until its pictures have changed, measured in the page and in the kernel.

python tests/bench_workbench.py [PRESET]      over the stored run of PRESET (default: digits), in a headless Chromium
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from browsing import jupyterlab, page_of, panel, run_all

from funlora_lab import open_run, preset
from funlora_lab.flow import Solver
from funlora_lab.store import home
from funlora_lab.systems import solver_of
from funlora_lab.workbench.page import Workbench

MOVES = 20
MOVE = """async ([root, i]) => {
  const place = (name) => root.querySelector(`[data-place=${name}]`);
  const changed = (name, begun) => new Promise((done) => {
    const watch = new MutationObserver(() => { watch.disconnect(); requestAnimationFrame(() => done(performance.now() - begun)); });
    watch.observe(place(name), { childList: true });
  });
  const slider = root.querySelectorAll("[name^='frequency.']")[i % 4];
  slider.value = Number(slider.value) + (Math.floor(i / 4) % 2 ? -0.8 : 0.9);
  const begun = performance.now(), both = Promise.all([changed("picture", begun), changed("samples", begun)]);
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  return both;
}"""  # noqa: E501


def moves_in(page) -> tuple[list[float], list[float]]:
    """Milliseconds from a slider's event to the frame that shows the new F and spectrum, and the new samples."""
    lens, times = panel(page, "lens").locator(".funlora-panel").element_handle(), []
    for i in range(MOVES):
        times.append(page.evaluate(MOVE, [lens, i]))
        time.sleep(1.5)  # it rests, and the finer picture is drawn
    return tuple(map(list, zip(*times, strict=True)))


def said(name: str, times: list[float], wanted: float) -> None:
    print(f"{name}: median {statistics.median(times):.0f} ms, slowest {max(times):.0f} ms (wanted: below {wanted:g})")


def main(name: str) -> None:
    run = open_run(preset(name))
    lens, function, samples = Workbench(run).lens, [], []
    for i in range(MOVES):
        begun = time.perf_counter()
        lens.frequency = [value + (i + 1) / 10 for value in lens.frequency]
        function.append(1000 * (time.perf_counter() - begun))
        begun = time.perf_counter()
        lens.lens.draw(lens.bend, Solver("midpoint", 2), 3, loss=False)
        samples.append(1000 * (time.perf_counter() - begun))
    print(f"{name}, load of the machine {os.getloadavg()[0]:.1f}, {MOVES} moves")
    said("in the kernel, F and spectrum", function, 100)
    said("in the kernel, coarse samples", samples, 300)
    begun = time.perf_counter()
    lens.lens.draw(lens.bend, solver_of(run.experiment), 9)
    print(f"in the kernel, fine samples and flow loss: {1000 * (time.perf_counter() - begun):.0f} ms")
    with tempfile.TemporaryDirectory() as work, jupyterlab(Path(work), home(), name) as at, page_of(1024, 768) as page:
        print(f"all cells: {run_all(page, at):.1f} s (wanted: below 12)")
        shown, drawn = moves_in(page)
        said("in the page, F and spectrum", shown, 150)
        said("in the page, new samples", drawn, 400)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["digits"])
