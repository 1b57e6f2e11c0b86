"""Every test works in folders of its own: no test reads or writes the runs or figures of the clone."""

import os
import shutil

os.environ["OMP_NUM_THREADS"] = "1"  # here and in every process started: bits are compared, and they depend on it

import pytest

from funlora_lab import open_run, preset
from funlora_lab.store import fingerprint, read_tensors


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNLORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FUNLORA_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("FUNLORA_RAY", "")
    monkeypatch.setenv("FUNLORA_BASE_WORKERS", "")


@pytest.fixture(scope="session")
def smoke_home(tmp_path_factory):
    """A home with one finished run of the smoke preset; read it, but train into other homes."""
    home = tmp_path_factory.mktemp("smoke-home")
    open_run(preset("smoke"), "cpu", home=home)
    return home


@pytest.fixture
def smoke_run(smoke_home, tmp_path):
    """The finished smoke run, opened in a copy of its home, since reading may draw more samples."""
    return open_run(preset("smoke"), "cpu", home=shutil.copytree(smoke_home, tmp_path / "smoke-home"))


@pytest.fixture(scope="session")
def numbers():
    """numbers(home): the fingerprint of every tensor file of a home's artefacts, apart from how long it took."""

    def numbers(home):
        files = sorted((home / "artefacts").glob("*/*.safetensors"))
        return {f"{file.parent.name}/{file.name}": fingerprint(read_tensors(file)[0]) for file in files}

    return numbers
