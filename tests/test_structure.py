"""The house: few rooms, imports pointing down only, short files, and a core that needs no Jupyter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import funlora_lab

PACKAGE = Path(funlora_lab.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = (  # from the top floor down: a room imports from rooms below it, and from itself
    ("__main__",),
    ("commands",),
    ("workbench",),
    ("studies",),
    ("cluster",),
    ("continual",),
    ("systems",),
    ("training", "data", "adapters"),
    ("store", "unet", "flow", "diffusion"),
    ("presets",),
    ("experiment",),
    ("seeds", "errors"),
)
FLOOR = {room: floor for floor, rooms in enumerate(reversed(ORDER)) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "funlora_lab":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("funlora_lab.")}
    return found & set(FLOOR)


ROOMS = {room for path in FILES if (room := room_of(path)) != "__init__"}
ARROWS = {room: set() for room in ROOMS}
for _path in FILES:
    if room_of(_path) != "__init__":
        ARROWS[room_of(_path)] |= imported(_path) - {room_of(_path)}


def test_every_room_has_a_floor_and_there_are_few():
    assert set(FLOOR) == ROOMS
    assert len(ROOMS) <= 18


def test_imports_point_down():
    upwards = [(room, other) for room, others in ARROWS.items() for other in others if FLOOR[other] >= FLOOR[room]]
    assert not upwards


def test_the_longest_chain_of_imports_is_eleven_rooms():
    def chain(room: str) -> int:
        return 1 + max(map(chain, ARROWS[room]), default=0)

    assert max(map(chain, ROOMS)) <= 11


PRIOR = {"diffusion.py", "studies/prior.py"} | {
    f"systems/{name}.py" for name in ("classifier", "ddgr", "denoiser", "jdcl", "stable")
}


def test_the_package_is_thin():
    lines = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    assert max(lines.values()) <= 300, max(lines, key=lines.get)
    prior = sum(lines[name] for name in PRIOR)  # the systems that the paper compares with, and what they alone need
    assert prior <= 900
    assert sum(lines.values()) - prior <= 11200
    above = ("studies", "cluster", "workbench", "commands", "__main__")
    core = {name for name in lines if name.partition("/")[0].removesuffix(".py") not in above} - PRIOR
    assert sum(lines[name] for name in core) <= 5620


def test_the_panels_are_thin():
    """What Python, the browser and its style sheet hold together."""
    files = [path for path in (PACKAGE / "workbench").iterdir() if path.suffix in (".py", ".js", ".css")]
    assert {path.suffix for path in files} == {".py", ".js", ".css"}
    assert sum(len(path.read_text().splitlines()) for path in files) <= 2400


def test_no_generator_carries_a_result():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign | ast.Return | ast.AnnAssign):
                assert not isinstance(node.value, ast.YieldFrom), path


def test_only_the_panels_need_jupyter():
    program = f"""
import importlib, pkgutil, sys
for name in ("ipywidgets", "IPython", "jupyterlab", "papermill", "nbformat", "notebook"):
    sys.modules[name] = None
import funlora_lab
for module in pkgutil.walk_packages(funlora_lab.__path__, "funlora_lab."):
    if not module.name.startswith(("funlora_lab.workbench", "funlora_lab.__main__")):
        importlib.import_module(module.name)
for name in funlora_lab.__all__:
    getattr(funlora_lab, name)
assert {str(PACKAGE)!r} in funlora_lab.__path__[0]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(AttributeError, match="nosuch"):
        _ = funlora_lab.nosuch
