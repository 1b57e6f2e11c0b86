"""A lease of one GPU, from nothing: run from the root of a clone; PyTorch and its friends are all that it needs.

    python3 figures/cifar10/lease.py SECONDS

does in so many seconds what is not done yet, in this order, and packs what there is for the way back: checks, the
table of speeds, cifar10-quick, the full network. Called again it goes on. In the environment:

    KEEP      a folder on that machine's disk (/tmp/keep)       OUT   what travels back (/tmp/out)
    ARCHIVE   CIFAR10 as folders train/<class>/*, test/<class>/* in a tar file; or DATA="data_root=FOLDER"
    CARRIED   what came back from an earlier lease: its small files go on, the full network starts from its base
    FULL      further settings of the full network ("base_images=0": adapters over the carried base)
    SETTINGS  further settings of both, and TIMES "check speed pack" in seconds: to rehearse at toy size
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
KEEP, OUT = Path(os.environ.get("KEEP", "/tmp/keep")), Path(os.environ.get("OUT", "/tmp/out"))
CHECK, SPEED, PACK = map(int, os.environ.get("TIMES", "60 90 40").split())
SHORTEST = 20  # seconds for which a run is begun at all
# the preset's dopri5 at 1e-5 is not for bf16, whose rounding lies above that; an average from the start can be carried
SIZE = "precision=bf16 solver=midpoint steps=8 chunk=1000 lanes=8 base_ema_start=0"


def words(*names: str) -> list[str]:
    """What these variables of the environment say, word by word."""
    return [word for name in names for word in os.environ.get(name, "").split()]


class Lease:
    """So many seconds, of which the last are for packing; what is called, and what it says, stands in OUT/lease.log."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds - PACK
        KEEP.mkdir(parents=True, exist_ok=True)
        OUT.mkdir(parents=True, exist_ok=True)
        self.log = (OUT / "lease.log").open("a")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # of what is called: os.environ itself must not change while another thread starts a process
        self.environment = os.environ | {"FUNLORA_HOME": str(KEEP / "runs"), "PYTHONUNBUFFERED": "1"}
        self.environment |= {"FUNLORA_SAVE_SECONDS": "300", "PYTHONPATH": path}

    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, line: str) -> None:
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def call(self, seconds: float, name: str, *command: str | Path) -> str:
        """Python with these words for at most so many seconds -> its last line; its errors go to KEEP/<name>.err."""
        with (KEEP / f"{name}.err").open("a") as errors:
            given = {"stdout": subprocess.PIPE, "stderr": errors, "text": True, "env": self.environment}
            with subprocess.Popen([sys.executable, *map(str, command)], **given) as process:
                timer = threading.Timer(max(seconds, 1), process.terminate)
                timer.start()
                line = ""
                for line in process.stdout:
                    self.say(line.rstrip())
                timer.cancel()
        if process.returncode:
            last = (KEEP / f"{name}.err").read_text().splitlines()[-1:] or [""]
            self.say(f"{name}: ended with {process.returncode} {last[0]}")
        return line

    def once(self, seconds: float, name: str, *command: str | Path) -> None:
        """The same, unless it was begun in an earlier call of this script."""
        if not (KEEP / f"{name}.err").exists():
            self.call(min(seconds, self.left()), name, *command)

    def run(self, preset: str, *settings: str) -> None:
        """A run, or the rest of it, as far as there is time; a finished one is verified."""
        if self.left() < SHORTEST:
            return self.say(f"{preset}: no time left")
        given = [part for word in settings for part in ("--set", word)]
        minutes = f"{(self.left() - 15) / 60:.3f}"  # the state of the full network takes seconds to save
        command = ["-m", "funlora_lab", "run", preset, *given, "--minutes", minutes, "--json"]
        said = self.call(self.left() + 5, preset, *command)
        if said.startswith("{") and (found := json.loads(said))["finished"] and self.left() > SHORTEST:
            self.once(self.left(), f"{preset}-verify", "-m", "funlora_lab", "verify", found["run"], "--device", "cuda")


def main(seconds: float) -> None:
    if archive := os.environ.get("ARCHIVE"):
        os.environ["DATA"] = f"data=folder data_root={KEEP / 'data'}"
    lease, begun = Lease(seconds), time.monotonic()
    reading = threading.Thread(target=lease.call, args=(600, "data", HERE / "parts.py", "data", archive or "", KEEP))
    reading.start()  # pictures are unpacked and decoded while others check and measure
    base = KEEP / "base.safetensors"
    if (carried := os.environ.get("CARRIED")) and not base.exists():
        lease.call(60, "unpack", HERE / "parts.py", "unpack", carried, KEEP)
    lease.once(CHECK, "check", HERE / "parts.py", "check", KEEP)
    without = (KEEP / "without").read_text() if (KEEP / "without").exists() else ""
    lease.environment = {**lease.environment, "FUNLORA_WITHOUT": without}
    lease.say(f"without: {without or 'nothing'}")
    lease.once(SPEED, "speed", HERE / "parts.py", "speed", KEEP, str(SPEED - 15))
    reading.join()
    lease.run("cifar10-quick", *words("DATA", "SETTINGS"))
    start = [f"base_weights={base}"] if base.exists() else []
    lease.run("cifar10", *SIZE.split(), *start, *words("DATA", "SETTINGS", "FULL"))
    if (KEEP / "speed.jsonl").exists():
        shutil.copy(KEEP / "speed.jsonl", OUT)
    lease.call(PACK + 20, "pack", HERE / "parts.py", "pack", KEEP / "runs", OUT)
    lease.say(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        sys.exit(__doc__)
    main(float(sys.argv[1]))
