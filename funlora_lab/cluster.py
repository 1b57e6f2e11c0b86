"""A run's stages as tasks of Ray, on one machine or on many: ``funlora sweep imagenet100 --ray HOST:6379``.

The driver, the process that asks, goes through the stages of every run read-only; an artefact that is missing becomes a
task, which calls the same function as a single machine, in a folder of its node, a base perhaps in several processes of
Ray Train. What it needs of the driver's home and what it made travel as whole files. So no two tasks make one artefact,
a node that dies costs its tasks alone, and a new driver finds all that was finished.
"""

import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

from funlora_lab import continual, store
from funlora_lab.continual.stages import Stage, cost, make, plan
from funlora_lab.data import Dataset, load
from funlora_lab.errors import LabError, Missing
from funlora_lab.experiment import Experiment
from funlora_lab.training import BACKENDS, PATIENCE, Event, Report, Runtime, Team, ignore, own_device, pick_device

TRIES = 3  # of a task whose node or process dies, or that ends in another error than a sentence
Files = dict[str, bytes]  # by their place in a home


class Desk:
    """A Ray actor on the driver's machine: hands out files of the driver's home, and hears how far tasks are."""

    def __init__(self, home: Path):
        self.home, self.said = home, {}

    def give(self, folder: str) -> Files:
        return {f"{folder}/{path.name}": path.read_bytes() for path in (self.home / folder).glob("[!.]*")}

    def hear(self, task: str, node: str, share: float) -> None:
        self.said[task] = node, share

    def heard(self) -> dict[str, tuple[str, float]]:
        """Task -> (its node, the share of it that is done)."""
        return self.said


class NodeStore(store.Store):
    """The store of a task: what the driver's home has of an artefact, ``give(folder)``, comes when it is named."""

    def __init__(self, folder: Path, give: Callable[[str], Files]):
        super().__init__(folder)
        self.give, self.named = give, set()

    def artefact(self, kind: str, **inputs) -> store.Artefact:
        artefact = super().artefact(kind, **inputs)
        if (name := f"artefacts/{artefact.name}") not in self.named:
            self.named.add(name)
            files = self.give(name)
            if not artefact.folder.exists() or f"{name}/{artefact.result_file.name}" in files:
                keep(self.folder, files)  # else a try that died left there more than the home has
                for file in files:
                    os.utime(self.folder / file, (0, 0))  # by which files that came are known
        return artefact

    def new(self) -> Files:
        """All files that were made here, of artefacts and of the run."""
        files = [path for path in self.folder.rglob("[!.]*") if path.is_file() and path.stat().st_mtime]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}


def keep(home: Path, files: Files) -> None:
    """Write files into a home in the order of their names, by which results come last."""
    for name in sorted(files):
        store.make_folder((home / name).parent)
        store.write_atomically(home / name, files[name])


def work(desk, name: str, stage: Stage, experiment: Experiment, dataset: Dataset, how: dict) -> Files | str:
    """A task: make a stage -> its new files; a LabError comes back as a sentence with the node, other errors raise."""
    import ray

    team = Team.joined()
    node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
    ray.get(desk.hear.remote(name + f" {team.rank}" * (team.rank > 0), node, 0.0))

    def report(event: Event) -> None:
        if event["event"] == "loss" and "replayed" not in event and not team.rank:
            desk.hear.remote(name, node, event["step"] / event["steps"])

    folder = Path(tempfile.gettempdir(), f"funlora-{os.getuid()}", store.key_of({name: how["home"]}))
    files = team.store(folder) if team.rank else NodeStore(folder, lambda name: ray.get(desk.give.remote(name)))
    try:
        torch.set_num_threads(how["threads"])
        how["register"]()
        device = own_device(pick_device(how["device"]))
        make(stage, experiment, Runtime(device, report=report, team=team, dataset=dataset, store=files), folder)
    except LabError as reason:
        if team.size > 1:  # the others must not wait for this process
            raise LabError(f"on {node}: {reason}") from None
        return f"on {node}: {reason}"
    if team.rank:
        return {}
    new = files.new()
    shutil.rmtree(folder, ignore_errors=True)
    return new


def work_together(desk, name: str, stage: Stage, experiment: Experiment, images: list, how: dict) -> Files | str:
    """``work`` in several processes of Ray Train, on any nodes, each with a GPU or cores of its own.

    The first one returns the files: the storage of Ray Train, which all nodes would have to share, is not used.
    """
    import ray.train.torch

    with tempfile.TemporaryDirectory() as storage:
        trainer = ray.train.torch.TorchTrainer(
            lambda: work(desk, name, stage, experiment, ray.get(images[0]), how),
            torch_config=ray.train.torch.TorchConfig(how["backend"], timeout_s=int(PATIENCE.total_seconds())),
            scaling_config=ray.train.ScalingConfig(**how["scaling"]),
            run_config=ray.train.RunConfig(storage_path=storage),
        )
        try:
            return trainer.fit().return_value
        except ray.train.WorkerGroupError as reason:  # one that lost the others ends in a RuntimeError
            rank, cause = min(reason.worker_failures.items(), key=lambda failed: isinstance(failed[1], RuntimeError))
            if isinstance(cause, LabError):
                return str(cause)
            if node := ray.get(desk.heard.remote()).get(f"{name} {rank}"):
                ray.get(desk.hear.remote(name, *node))
            raise cause from None


class Ordered:
    """A run as the driver sees it: its stages that are not made yet, each with those that it waits for."""

    def __init__(self, experiment: Experiment, home: Path, runtime: Runtime, images):
        self.record, self.experiment, self.runtime = store.Run.of(experiment, home), experiment, runtime
        self.record.check()
        self.images, self.name, self.held = images, self.record.folder.name, ExitStack()
        given = continual.prepare(experiment, runtime, home, read_only=True)
        self.waiting = plan(*given)
        self.costs = {stage: cost(stage, *given) for stage in self.waiting}
        self.total, self.noted = 1.0, -1.0  # what is missing costs at the beginning, the share that its log holds

    left = property(lambda self: sum(self.costs[stage] for stage in self.waiting))


class Driver:
    """Keeps Ray in tasks until every run has its results."""

    def __init__(self, ray, experiments: list[Experiment], device: str, home: Path, runtime: Runtime, register=bool):
        self.ray, self.home, self.runtime, self.begun = ray, home, runtime, time.monotonic()
        there, word = ray.cluster_resources(), os.environ.get("FUNLORA_BASE_WORKERS") or "1"
        gpus, threads = int(device != "cpu" and "GPU" in there), int(os.environ.get("OMP_NUM_THREADS") or 1)
        most = max(1, int(there["GPU"] if gpus else there.get("CPU", 0) // threads))
        if not word.isdecimal() or not 1 <= int(word) <= most:
            raise LabError(f"base-workers={word}: accepted by this cluster is a whole number from 1 to {most}.")
        self.how = {"home": str(home), "register": register, "threads": threads, "device": device}
        each = {"use_gpu": gpus > 0, "resources_per_worker": {"CPU": threads, "GPU": gpus}}
        self.how |= {"backend": BACKENDS["cuda" if gpus else "cpu"], "scaling": {"num_workers": int(word), **each}}
        again = {"max_retries": TRIES - 1, "retry_exceptions": True}
        self.work = ray.remote(num_gpus=gpus, num_cpus=threads, **again)(work)
        self.together = int(word) > 1 and ray.remote(num_cpus=0, **again)(work_together)
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self.desk = ray.remote(num_cpus=0, label_selector=here)(Desk).remote(home)
        self.tasks: dict = {}  # reference -> what a task makes, as the sentence that says that it is missing
        self.asking: dict[str, list[tuple[Ordered, Stage]]] = {}  # such a sentence -> which stages wait for it
        self.ended, self.failures, self.runs, images = set(), [], [], {}
        for e in experiments:
            dataset = load(e, home, runtime.check)
            if (key := (dataset.fingerprint, dataset.unlabelled_fingerprint)) not in images:
                images[key] = Runtime(dataset=dataset), ray.put(dataset)
            self.runs.append(Ordered(e, home, *images[key]))

    def ask(self, run: Ordered, stages: list[Stage]) -> None:
        """Have tasks make what stages lack first; where nothing is lacking, go on with what waited for that stage."""
        for stage in stages:
            try:
                make(stage, run.experiment, run.runtime, self.home, read_only=True)
            except Missing as reason:
                if (lack := str(reason)) in self.ended:
                    raise LabError(f"A task for the {stage} of {run.name} ended, and yet: {lack}") from None
                if lack not in self.asking:
                    base = stage.kind == "network" and not stage.task
                    task, images = (self.together, [run.images]) if base and self.together else (self.work, run.images)
                    self.tasks[task.remote(self.desk, lack, stage, run.experiment, images, self.how)] = lack
                self.asking.setdefault(lack, []).append((run, stage))
                continue
            del run.waiting[stage]
            after = [later for later, before in run.waiting.items() if stage in before]
            for later in after:
                run.waiting[later].remove(stage)
            self.ask(run, [later for later in after if not run.waiting[later]])

    def collect(self) -> None:
        """Take in what tasks made; a run that needs what could not be made is given up, all others go on."""
        for reference in self.ray.wait(list(self.tasks), timeout=0.5)[0]:
            lack = self.tasks.pop(reference)
            waiting = [(run, stage) for run, stage in self.asking.pop(lack) if run.waiting]
            self.ended.add(lack)
            try:
                new = self.ray.get(reference)
            except self.ray.exceptions.RayError as reason:
                node = self.ray.get(self.desk.heard.remote()).get(lack, ["no node"])[0]
                cause = getattr(reason, "cause", None) or reason
                new = f"in {TRIES} tries, last on {node}: {type(cause).__name__}: {first_line(cause)}"
            if isinstance(new, str):
                self.failures += [f"The {stage} of {run.name} failed {new}" for run, stage in waiting]
                for run, _ in waiting:
                    run.waiting.clear()
                    run.held.close()
            else:
                keep(self.home, new)
                for run, stage in waiting:
                    self.ask(run, [stage])

    def event(self) -> Event:
        """How far all runs are; the log of each holds how far it is itself, whenever that is a thousandth more."""
        heard, seconds = self.ray.get(self.desk.heard.remote()), time.monotonic() - self.begun
        left = {run: run.left for run in self.runs}
        for lack, waiting in self.asking.items():
            for run, stage in waiting:
                left[run] -= heard.get(lack, ["", 0.0])[1] * run.costs[stage] * (stage in run.waiting)
        for run in self.runs:
            if run.waiting and (share := 1 - left[run] / run.total) >= run.noted + 0.001:
                run.noted = share
                run.record.log({"event": "cluster", "share": share, "seconds": seconds})
        share = 1 - sum(left.values()) / sum(run.total for run in self.runs)
        busy = sum(lack in heard for lack in self.asking)
        return {"event": "cluster", "share": share, "seconds": seconds, "done": len(self.ended), "running": busy}

    def drive(self) -> None:
        """Go on until every run is finished or given up; raises LabError for one that was, and Stopped when asked."""
        try:
            begun = {"device": "a Ray cluster", "started": datetime.now(UTC).isoformat(timespec="seconds")}
            for run in sorted(self.runs, key=lambda run: run.name):  # of two drivers one waits, neither for ever
                run.held.enter_context(store.locked(run.record.folder, self.runtime.check, self.runtime.tell))
                if not run.record.results():
                    run.record.open(begun)
                self.ask(run, [stage for stage, before in run.waiting.items() if not before])
                run.total = run.left or 1.0
            while any(run.waiting for run in self.runs):
                self.collect()
                self.runtime.report(self.event())
                self.runtime.check()
        except self.ray.exceptions.RayError as reason:
            raise LabError(f"The cluster was lost: {first_line(reason)}; what is stored stays.") from None
        finally:
            for reference in self.tasks:  # of runs that were given up, or when asked to stop
                self.ray.cancel(reference)
            for run in self.runs:
                run.held.close()
        if self.failures:
            raise LabError("\n".join(self.failures))


def first_line(reason: BaseException) -> str:
    return str(reason).strip().partition("\n")[0]


def connect(address: str, tell: Callable[[str], None]):
    """The module ray, connected with the cluster at HOST:PORT, or for ``local`` with a new one of this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers unless this says no
    try:
        import ray
    except ImportError:
        raise LabError("--ray needs Ray, which is not installed: pip install 'funlora-lab[cluster]'.") from None
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address != "local" and not ray.is_initialized():
            host, _, port = address.partition(":")
            socket.create_connection((host, int(port)), 5).close()  # Ray itself tries for minutes
        context = ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    except Exception as reason:  # of many kinds, the plain one among them
        accepted = "accepted is local, or the HOST:PORT of a head that `ray start --head` started"
        raise LabError(f"ray={address}: no cluster answers there ({first_line(reason)}); {accepted}.") from None
    with suppress(ValueError):  # in another thread than the main one, where Ray sets none
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end the driver without a word
    if context.dashboard_url:
        tell(f"Ray's dashboard: http://{context.dashboard_url}")
    return ray


def do(experiments: list, device="auto", home: Path | None = None, runtime=None, register=bool) -> None:
    """Do what is missing of some experiments' runs on the cluster that FUNLORA_RAY names; nothing where it names none.

    Every task calls ``register()`` first. Raises LabError for runs that failed, after all others are done.
    """
    home, runtime, address = home or store.home(), runtime or Runtime(), os.environ.get("FUNLORA_RAY")
    if todo := [e for e in dict.fromkeys(experiments) if address and not store.Run.of(e, home).results()]:
        Driver(connect(address, runtime.tell), todo, device, home, runtime, register).drive()


def open_run(experiment: Experiment, device="auto", report: Report | None = None, home: Path | None = None, watch=None):
    """``continual.open_run``, where FUNLORA_RAY names a cluster with all training there."""
    do([experiment], device, home, Runtime(report=report or ignore))
    return continual.open_run(experiment, device, report, home, watch)
