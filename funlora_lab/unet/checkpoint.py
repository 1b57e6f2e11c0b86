"""A base of one's own: weights of a U-Net trained elsewhere, read without running any code that a file may carry."""

import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from funlora_lab.errors import LabError

STATE_DICTS = ("ema_model", "net_model", "model", "state_dict", "ema")  # where a state dict may lie, best first
ACCEPTED = f"accepted is .safetensors, or a state dict by torch.save, plain or under {', '.join(STATE_DICTS)}"


def read_checkpoint(path: Path | str) -> dict[str, Tensor]:
    """The weights of a file, on the CPU, without DDP's and torch.compile's prefixes; LabError where it holds none."""
    try:
        if str(path).endswith(".safetensors"):
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as reason:
        raise LabError(f"Cannot read {path}: {reason.strerror or reason}; {ACCEPTED}.") from None
    except Exception as reason:  # a damaged or foreign file can make the readers raise almost anything
        raise LabError(f"{path} is damaged or foreign ({type(reason).__name__}); {ACCEPTED}.") from None
    if isinstance(content, dict):
        content = next((content[key] for key in STATE_DICTS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise LabError(f"{path} holds no state dict; {ACCEPTED}.")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): value for name, value in content.items()}


def load_base(net: nn.Module, weights: dict[str, Tensor], where: Path | str) -> None:
    """Put weights read from ``where`` into a U-Net, which keeps its label embedding if they hold none; or LabError."""
    own = net.state_dict()
    weights = {"label_emb.weight": own["label_emb.weight"]} | weights
    theirs, ours = ({name: tuple(value.shape) for name, value in each.items()} for each in (weights, own))
    wrong = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if wrong:
        faults = [f"{n} is {theirs.get(n, 'missing')} where {ours.get(n, 'nothing')} is expected" for n in wrong[:3]]
        more = f"; and {len(wrong) - 3} more" if wrong[3:] else ""
        raise LabError(f"{where} does not fit the experiment's network: {'; '.join(faults)}{more}.")
    net.load_state_dict(weights)
