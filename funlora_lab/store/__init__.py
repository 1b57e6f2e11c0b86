"""What is kept on the disk: files, artefacts that are made once, and the runs made of them."""

# ruff: noqa: I001
# fmt: off
from funlora_lab.store.files import (
    append_line, asking, canonical, clear_leftovers, fingerprint, in_use, locked, make_folder, packed, parse_tensors,
    read_json, read_lines, read_tensors, safe_name, update_json, write_atomically, write_json, write_tensors,
)
from funlora_lab.store.artefacts import FORMAT, Artefact, Store, checkout, home, key_of
from funlora_lab.store.runs import UNFINISHED, Run, listing
