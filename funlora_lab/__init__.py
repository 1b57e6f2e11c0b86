"""FunLoRA: generative class-incremental learning with functional low-rank adapters.

run = funlora_lab.open_run(funlora_lab.preset("digits"))
"""

from importlib import import_module

__version__ = "0.2.0"

# room -> its public names, imported when first asked for, so that importing the package costs nothing
_PUBLIC = {
    "experiment": "Experiment override",
    "presets": "preset",
    "errors": "LabError",
    "adapters": "Method function register",
    "data": "data_source",
    "systems": "Generator system",
    "continual": "open_folder run",
    "cluster": "open_run",
    "studies.verification": "verify",
}
_ROOM = {name: room for room, names in _PUBLIC.items() for name in names.split()}
__all__ = ["__version__", *_ROOM]


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"module 'funlora_lab' has no attribute '{name}'")
    return getattr(import_module(f"funlora_lab.{_ROOM[name]}"), name)
