"""The benchmark runs at a tiny size, and what it compares computes the same function."""

import json
import sys

import benchmark
import pytest
import torch
from benchmark import Race, flops, measure, table
from contenders import torchcfm_unet

from funlora_lab import LabError, preset
from funlora_lab.__main__ import main
from funlora_lab.systems import build_unet
from funlora_lab.training import Runtime
from funlora_lab.training.device import has_bf16

TINY = preset("smoke").but(base_channels=32, multipliers=(1,), window="2-5", image_size=4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result():
    pytest.importorskip("torchcfm")
    return measure(TINY, Runtime(), batch=4, repeats=1, lane_images=20)


def test_one_object_holds_every_ratio_and_rate(result):
    result = json.loads(json.dumps(result))
    bf16 = has_bf16("cpu")
    for name in benchmark.RATIOS:
        assert (0 < result[name] < 1000) if bf16 or "bf16" not in name else result[name] is None, name
    assert set(result["images_per_second"]) == {"base", "adapter", "sampling"}
    assert all(value > 0 for value in result["images_per_second"].values())
    rates = result["matrix_flops_per_second"]
    assert rates["fp32"] > 1e6
    assert rates["bf16"] > 1e6 if bf16 else rates["bf16"] is None
    assert {"1 x 20", "5 x 4", "20 x 1"} == set(result["seconds_per_adapter_step"])
    for name, share in result["share_of_matrix_rate"].items():
        rate = result["images_per_second"][name] * result["gflop_per_image"][name] * 1e9
        assert share == pytest.approx(rate / result["matrix_flops_per_second"]["fp32"])


def test_the_table_shows_every_ratio(result):
    shown = table(result)
    for name in benchmark.RATIOS:
        ratio = "-" if result[name] is None else f"{result[name]:.2f}"
        assert f" {ratio}  {name}: " in shown


def test_torchcfm_is_the_same_network():
    pytest.importorskip("torchcfm")
    theirs, ours = torchcfm_unet(TINY, 2, CPU).eval(), build_unet(TINY, 2).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    t, x, y = torch.rand(4), torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(ours(t, x, y), theirs(t, x, y), atol=1e-5, rtol=1e-5)


def test_flops_of_one_image():
    cost = flops(TINY, CPU)
    convolutions = 2 * 9 * 16 * 32 * (1 + 1)  # the first and the last, 1 channel on one side
    assert cost["sampling"] > convolutions
    assert 2.5 * cost["sampling"] < cost["base"] <= 3 * cost["sampling"]  # forward, and two products on the way back
    assert cost["sampling"] < cost["adapter"] < cost["base"]


def test_a_ratio_is_the_median_of_neighbouring_turns():
    race = Race(CPU, times={"a": [1.0, 2.0, 9.0], "b": [2.0, 4.0, 3.0]})
    assert race.ratio("a", "b") == 0.5


def test_a_missing_torchcfm_gives_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchcfm.models.unet.unet", None)
    assert main(["bench", "digits"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(LabError, match="torchcfm, which is not installed"):
        torchcfm_unet(TINY, 2, CPU)


def test_without_a_clone_one_sentence_says_where_the_benchmark_is(monkeypatch, capsys):
    monkeypatch.setattr("funlora_lab.store.checkout", lambda: None)
    assert main(["bench", "digits"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "comes with a clone" in said
