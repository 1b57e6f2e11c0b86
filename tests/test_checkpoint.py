"""A base of one's own: weights as torchcfm, DDP and torch.compile leave them load whole, anything else is refused."""

import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_unet import SMALL, assert_same_function, awake, torchcfm_unet

from funlora_lab.errors import LabError
from funlora_lab.unet import UNet, load_base, read_checkpoint

LABELS = "label_emb.weight"


@pytest.fixture(scope="module")
def weights():
    return awake(UNet(classes=2, **SMALL)).state_dict()


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def same(read, state):
    return list(read) == list(state) and all(torch.equal(read[name], state[name]) for name in state)


def test_a_file_of_torchcfms_training_gives_its_average_which_computes_the_same_in_our_network(tmp_path):
    theirs, other = torchcfm_unet(SMALL), UNet(classes=2, **SMALL)
    optimizer = torch.optim.Adam(other.parameters())
    content = {
        "net_model": other.state_dict(),
        "ema_model": prefixed("module.", theirs.state_dict()),
        "sched": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).state_dict(),
        "optim": optimizer.state_dict(),
        "step": 7,
    }
    torch.save(content, tmp_path / "cfm.pt")
    ours = UNet(classes=2, **SMALL)
    load_base(ours, read_checkpoint(tmp_path / "cfm.pt"), "cfm.pt")
    assert_same_function(ours, theirs, SMALL)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_prefixes_go_from_both_kinds_of_file(weights, prefix, tmp_path):
    state = prefixed(prefix, weights)
    torch.save(state, tmp_path / "a.ckpt")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    for name in ("a.ckpt", "a.safetensors"):
        assert dict(read_checkpoint(tmp_path / name)).keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in read_checkpoint(str(tmp_path / name)).items())


def test_a_state_dict_is_found_under_each_of_its_names_the_average_before_the_others(weights, tmp_path):
    names = ["ema", "state_dict", "model", "net_model", "ema_model"]  # the best last
    content = {"epoch": 3, "config": {"lr": 0.1}}
    for i, name in enumerate(names):
        content = {name: {"x": torch.tensor(i)}} | content
        torch.save(content, tmp_path / "a.pt")
        assert read_checkpoint(tmp_path / "a.pt")["x"] == i


class Code:
    """What pickle would run."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_what_is_no_checkpoint_ends_in_one_sentence_and_runs_nothing(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(weights, "whole.pt")
    safetensors.torch.save_file(weights, "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        data = Path(name).read_bytes()
        Path(name.replace("whole", "cut")).write_bytes(data[: len(data) // 2])
        Path(name.replace("whole", "empty")).write_bytes(b"")
        Path(name.replace("whole", "text")).write_text("no tensors\nat all")
        Path(name.replace("whole", "folder")).mkdir()
    Path("code.pt").write_bytes(pickle.dumps({"model": Code()}, protocol=2))
    torch.save({"model": Code()}, "zip.pt")
    for name, content in {
        "list": [1],
        "none": {},
        "epoch": {"epoch": 3},
        "mixed": {"a": torch.ones(1), "b": 2},
    }.items():
        torch.save(content, name + ".pt")
    torch.save(weights["out.2.bias"], "tensor.pt")
    Path("whole.pt").unlink(), Path("whole.safetensors").unlink()
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "missing.pt", tmp_path / "missing.safetensors"]:
        with pytest.raises(LabError, match=re.escape(str(path))) as caught:
            read_checkpoint(path)
        assert re.fullmatch(r"[^\n]+; accepted is .*ema_model.*\.", str(caught.value))
    assert not Path("ran").exists()


def test_the_label_embedding_may_be_absent_but_not_of_another_size(weights):
    net = UNet(classes=2, **SMALL)
    own = net.label_emb.weight.detach().clone()
    load_base(net, {name: value.half() for name, value in weights.items() if name != LABELS}, "a.pt")
    assert torch.equal(net.label_emb.weight, own)
    assert torch.equal(net.out[2].weight, weights["out.2.weight"].half().float())
    with pytest.raises(LabError, match=r"label_emb.weight is \(3, 128\) where \(2, 128\) is expected\.$"):
        load_base(net, weights | {LABELS: torch.zeros(3, 128)}, "a.pt")


def test_what_does_not_fit_is_named_key_by_key_and_changes_nothing(weights):
    net = UNet(classes=2, **SMALL)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    foreign = {name: value for name, value in weights.items() if name != "out.2.bias"}
    foreign |= {"out.2.weight": torch.zeros(3, 32), "foreign": torch.zeros(4)}
    expected = (
        r"^a\.pt does not fit the experiment's network: out\.2\.weight is \(3, 32\) where \(3, 32, 3, 3\) is expected; "
        r"out\.2\.bias is missing where \(3,\) is expected; foreign is \(4,\) where nothing is expected\.$"
    )
    with pytest.raises(LabError, match=expected):
        load_base(net, foreign, "a.pt")
    with pytest.raises(LabError, match=rf"; and {len(weights) - 4} more\.$"):  # all but the labels are missing
        load_base(net, {}, "a.pt")
    assert same(net.state_dict(), before)
