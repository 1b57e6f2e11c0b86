"""A sweep of twelve cells on two Ray nodes of one CPU each, beside one process: wall times, and what a task costs.

python tests/bench_cluster.py    (a minute or two; needs the extra ``cluster`` and two free cores)
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # in every process: a task computes in as many threads
os.environ["RAY_worker_niceness"] = "0"  # else Ray's workers give way to all others

import tempfile
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from funlora_lab import continual, preset
from funlora_lab.cluster import Driver
from funlora_lab.continual.stages import Stage
from funlora_lab.store import fingerprint, read_lines, read_tensors
from funlora_lab.training import Runtime

BASE = preset("smoke").but(score_after="last")
CELLS = [BASE.but(method=m, seed=s) for m in ("funlora", "shift", "power", "vanilla-mul") for s in range(3)]
WARM = BASE.but(seed=9, base_images=64, adapter_images=32)


def numbers(home: Path) -> dict[str, str]:
    files = home.glob("artefacts/*/*.safetensors")
    return {f"{file.parent.name}/{file.name}": fingerprint(read_tensors(file)[0]) for file in files}


def on_ray(home: Path, experiments: list) -> tuple[float, Driver]:
    home.mkdir(exist_ok=True)
    begun, driver = time.monotonic(), Driver(ray, experiments, "cpu", home, Runtime())
    driver.drive()
    return time.monotonic() - begun, driver


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        begun = time.monotonic()
        for e in CELLS:
            continual.run(e, home=one)
        alone = time.monotonic() - begun
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        nodes.connect()
        on_ray(Path(folder, "warm"), [WARM])  # starts the workers' processes
        together, driver = on_ray(two, CELLS)
        assert numbers(one) == numbers(two), "the artefacts differ"
        for log in two.glob("artefacts/*/log.jsonl"):
            steps = [(event.get("class"), event["step"]) for event in read_lines(log)]
            assert len(steps) == len(set(steps)), f"{log} was written twice"
        artefacts = [path for path in two.glob("artefacts/*") if not path.name.startswith("adapters-")]
        costs, images = [], driver.runs[0].images
        for cls in (0, 7) * 10:  # what is stored is fetched, loaded and found finished
            begun, stage = time.monotonic(), Stage("samples", 0, (cls,))
            assert ray.get(driver.work.remote(driver.desk, "stored", stage, BASE, images, driver.how)) == {}
            costs.append(time.monotonic() - begun)
        ray.shutdown()
        nodes.shutdown()
    print(f"{len(CELLS)} cells, {len(driver.ended)} tasks, {len(artefacts)} artefacts but groups of adapters")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"one process {alone:.1f} s; two nodes {together:.1f} s ({alone / together:.2f} times as fast)")
    print(f"a task beside its computing: median {sorted(costs)[10]:.3f} s, worst {max(costs):.3f} s of {len(costs)}")
    print("the same artefacts, bit for bit; none was computed twice")


if __name__ == "__main__":
    main()
