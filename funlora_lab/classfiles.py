"""One class as a file, and the classes that were brought into a run or taken out of it after it was measured.

A class file is a safetensors file with the class's row and, in its header, all that the row means nothing without:
the fingerprint of the frozen base, the method with its settings, the class's index and name, a checksum.

    <run>/classes/12.safetensors   class 12, imported
    <run>/classes/7.removed        class 7, learned by the run, was taken out

Nothing else of a run changes: results.json and metrics.jsonl stay what was measured, artefacts stay in the store
(other runs may share them), and an imported file takes the place of a learned class only after that was removed.
"""

from pathlib import Path

import torch

from funlora_lab.adapters import LABEL, Adapters, Row
from funlora_lab.disk import canonical, fingerprint, packed, read_tensors
from funlora_lab.errors import LabError
from funlora_lab.frozen import FrozenBase
from funlora_lab.store import Run
from funlora_lab.unet import UNet

KIND = "FunLoRA class"
FORMAT = 1


def base_fingerprint(net: UNet) -> str:
    """SHA-256 over the weights of the base: the same on every machine that holds these weights."""
    return fingerprint(net.state_dict())


def settings(adapters: Adapters) -> dict:
    """The settings on which the meaning of a row depends."""
    return {name: getattr(adapters.experiment, name) for name in adapters.method.settings}


def content(adapters: Adapters, row: Row, base: str, cls: int, name: str) -> bytes:
    """The class file of one row, learned over the base with fingerprint ``base``."""
    facts = {"kind": KIND, "format": FORMAT, "base": base, "class": cls, "name": name, "settings": settings(adapters)}
    return packed(row, facts)


def read(path: Path, adapters: Adapters, base: str) -> tuple[Row, dict]:
    """(row, facts) of a class file that fits the method and the base with fingerprint ``base``.

    Raises LabError saying what is wrong with the file, or does not fit.
    """
    row, facts = read_tensors(path)
    kinds = {"kind": str, "format": int, "base": str, "class": int, "name": str, "settings": dict}
    whole = all(type(facts.get(name)) is kind for name, kind in kinds.items())
    if not whole or (facts["kind"], facts["format"]) != (KIND, FORMAT) or facts["class"] < 0:
        raise LabError(f"{path} is no class file of this version: accepted is what `funlora export` writes.")
    if facts["base"] != base:
        raise LabError(f"{path} was learned over another base ({facts['base'][:12]}; this run's is {base[:12]}).")
    theirs, ours = ({k: canonical(v) for k, v in one.items()} for one in (facts["settings"], settings(adapters)))
    unlike = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if unlike:
        there = ", ".join(f"{name} {theirs.get(name, 'none')} instead of {ours.get(name, 'none')}" for name in unlike)
        raise LabError(f"{path} was learned with other settings than this run's: {there}.")
    expected = {name: value.shape for name, value in adapters.neutral().items()}
    if adapters.learns_label:
        expected[LABEL] = torch.Size([adapters.net.embedding])
    if {name: value.shape for name, value in row.items()} != expected:
        raise LabError(f"{path} does not hold the numbers that {adapters.experiment.method} learns for a class.")
    if not all(value.dtype == torch.float32 and value.isfinite().all() for value in row.values()):
        raise LabError(f"{path} holds numbers that are not finite floats of 32 bits.")
    return row, facts


def imported_file(run: Run, cls: int) -> Path:
    return run.folder / "classes" / f"{cls}.safetensors"


def removal_mark(run: Run, cls: int) -> Path:
    return run.folder / "classes" / f"{cls}.removed"


def apply(run: Run, learner: FrozenBase) -> dict[int, str]:
    """Take out of the learner what was removed from the run, put in what was imported; returns the latter's names."""
    folder = run.folder / "classes"
    for cls in [cls for cls in learner.rows if removal_mark(run, cls).exists()]:
        del learner.rows[cls], learner.keys[cls]
    names, files = {}, sorted(folder.glob("*.safetensors"))
    base = base_fingerprint(learner.net) if files else ""
    for path in files:
        row, facts = read(path, learner.adapters, base)
        cls, meaning = facts["class"], {"base": base, "settings": canonical(facts["settings"])}
        learner.rows[cls], learner.keys[cls] = row, f"row-{fingerprint(row, meaning)}"
        names[cls] = facts["name"]
    return names
