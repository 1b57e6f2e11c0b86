"""One class as a file, and the classes that were brought into a run or taken out of it after it was measured.

A class file holds the class's row and, in its header, what the row means nothing without: the fingerprint of the
frozen base, the method with its settings, the class's index and name, a checksum.

    <run>/classes/12.safetensors   class 12, imported
    <run>/classes/7.removed        class 7, taken out: its class file; results and artefacts stay as they are
"""

from contextlib import suppress
from pathlib import Path

import torch

from funlora_lab.adapters import LABEL, Adapters, Row
from funlora_lab.errors import Damaged, LabError
from funlora_lab.store import Run, canonical, fingerprint, packed, read_tensors
from funlora_lab.systems import Generator

KIND = "FunLoRA class"
FORMAT = 2


def content(adapters: Adapters, row: Row, base: str, cls: int, name: str) -> bytes:
    """The class file of one row, learned over the base whose weights have the fingerprint ``base``."""
    settings = adapters.method.identity(adapters.experiment)
    facts = {"kind": KIND, "format": FORMAT, "base": base, "class": cls, "name": name, "settings": settings}
    return packed(row, facts)


def read(path: Path, adapters: Adapters, base: str) -> tuple[Row, dict]:
    """(row, facts) of a class file that fits the method and the base with fingerprint ``base``.

    Raises LabError saying what is wrong with the file, or does not fit.
    """
    try:
        row, facts = read_tensors(path)
    except Damaged as reason:  # a file of the user's: nothing makes it anew
        raise LabError(f"{reason.finding}: accepted is what `funlora export` writes.") from None
    kinds = {"kind": str, "format": int, "base": str, "class": int, "name": str, "settings": dict}
    whole = all(type(facts.get(name)) is kind for name, kind in kinds.items())
    if not whole or (facts["kind"], facts["format"]) != (KIND, FORMAT) or facts["class"] < 0:
        raise LabError(f"{path} is no class file of this version: accepted is what `funlora export` writes.")
    if facts["base"] != base:
        raise LabError(f"{path} was learned over another base ({facts['base'][:12]}; this run's is {base[:12]}).")
    settings = (facts["settings"], adapters.method.identity(adapters.experiment))
    theirs, ours = ({name: canonical(value) for name, value in one.items()} for one in settings)
    unlike = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if unlike:
        there = ", ".join(f"{name} {theirs.get(name, 'none')} instead of {ours.get(name, 'none')}" for name in unlike)
        raise LabError(f"{path} was learned with other settings than this run's: {there}.")
    expected = {name: value.shape for name, value in adapters.neutral().items()}
    if adapters.learns_label:
        expected[LABEL] = torch.Size([adapters.net.embedding])
    if {name: value.shape for name, value in row.items()} != expected:
        raise LabError(f"{path} does not hold the numbers that {adapters.method.name} learns for a class.")
    if not all(value.dtype == torch.float32 and value.isfinite().all() for value in row.values()):
        raise LabError(f"{path} holds numbers that are not finite floats of 32 bits.")
    return row, facts


def file_of(run: Run, cls: int, ending: str) -> Path:
    """Where an imported class (``safetensors``), or the mark that one was taken out (``removed``), lies."""
    return run.folder / "classes" / f"{cls}.{ending}"


def names(run: Run) -> dict[int, str]:
    """Index and name of all classes that were brought into a run or taken out of it; the name "" in a damaged file."""
    found = {}
    for path in sorted((run.folder / "classes").glob("[0-9]*.*")):
        found[int(path.stem)] = ""
        with suppress(LabError):
            found[int(path.stem)] = str(read_tensors(path)[1].get("name", ""))
    return found


def removed(run: Run) -> dict[int, str]:
    """Index and name of the classes that were taken out of a run and not brought in again."""
    there = names(run)
    return {cls: there[cls] for cls in there if not file_of(run, cls, "safetensors").exists()}


def apply(run: Run, generator: Generator) -> tuple[dict[int, str], dict[int, str]]:
    """Take out of a generator what was removed from the run, put in what was imported.

    Returns the names of the latter, and of those whose files cannot be used why: they stop nobody who asks for others.
    """
    for cls in [cls for cls in generator.rows if file_of(run, cls, "removed").exists()]:
        del generator.rows[cls], generator.keys[cls]
    names, refused, files = {}, {}, sorted((run.folder / "classes").glob("*.safetensors"))
    base = fingerprint(generator.net.state_dict()) if files else ""
    for path in files:
        try:
            row, facts = read(path, generator.adapters, base)
        except LabError as reason:
            refused[int(path.stem)] = str(reason)
            continue
        cls, meaning = facts["class"], {"base": base, "settings": canonical(facts["settings"])}
        generator.rows[cls], generator.keys[cls] = row, f"row-{fingerprint(row, meaning)}"
        names[cls] = facts["name"]
    return names, refused
