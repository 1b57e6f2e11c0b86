"""Parameters a class, counted from the modules: every number of the paper's tables, to the digit."""

import json

import pytest

from funlora_lab.__main__ import main
from funlora_lab.adapters import METHODS, Adapters
from funlora_lab.presets import PRESETS
from funlora_lab.studies import ledger
from funlora_lab.systems import build_unet, meta_unet
from funlora_lab.unet import conv_layers

CIFAR, IMAGENET = PRESETS["cifar100"], PRESETS["imagenet100"]
WINDOWS = {
    "0-64": 34_054,
    "5-54": 29_440,
    "15-44": 18_432,
    "15-54": 24_832,
    "25-44": 13_312,
    "25-54": 19_712,
    "35-54": 13_056,
    "40-54": 9_728,
    "45-54": 6_400,
    "40-49": 6_656,
    "45-49": 3_328,
}


@pytest.mark.parametrize("method", ["vanilla-mul", "vanilla-add"])
def test_rank_one_windows(method):
    counted = {window: ledger.parameters_per_class(CIFAR.but(method=method, window=window)) for window in WINDOWS}
    assert counted == WINDOWS


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"method": "funlora"}, (10_028, 35_354)),
        ({"method": "power"}, (10_028, 35_354)),
        ({"method": "cosine-frozen"}, (9_878, 34_704)),
        ({"method": "power-frozen"}, (9_878, 34_704)),
        ({"method": "shift"}, (9_878, 34_704)),
        ({"method": "vanilla-mul", "extra_rank": (48, 50)}, (11_264, 35_590)),
        ({"method": "vanilla-add", "extra_rank": (48, 50)}, (11_264, 35_590)),
        ({"method": "vanilla-add", "extra_rank": (42, 44, 46)}, (11_264, 35_590)),
    ],
)
def test_functions_and_ranks_in_the_default_and_the_full_window(settings, numbers):
    for window, expected in zip(("40-54", "0-64"), numbers, strict=True):
        assert ledger.parameters_per_class(CIFAR.but(window=window, **settings)) == expected


@pytest.mark.parametrize(
    ("method", "cifar", "imagenet"),
    [
        ("funlora", 10_028, 13_652),
        ("scale-shift", 11_776, 16_128),
        ("lora-attention", 18_432, 75_264),
        ("lora-conv-v1", 12_288, 14_976),
        ("lora-conv-v2", 10_752, 14_208),
        ("label-embedding", 512, 512),  # the paper prints 0.0K, and counts embeddings with the base
    ],
)
def test_compared_methods(method, cifar, imagenet):
    assert ledger.parameters_per_class(CIFAR.but(method=method)) == cifar
    assert ledger.parameters_per_class(PRESETS["cifar10"].but(method=method)) == cifar
    assert ledger.parameters_per_class(IMAGENET.but(method=method)) == imagenet


@pytest.mark.parametrize(("ratio", "numbers"), [(1, 10_028), (2, 5_164), (4, 2_732), (8, 1_516), (16, 908)])
def test_ratios_divide_the_vectors_and_not_the_hyperparameters(ratio, numbers):
    assert ledger.parameters_per_class(CIFAR.but(ratio=ratio)) == numbers == 9_728 // ratio + 300


def test_totals_count_base_embeddings_and_one_row_a_new_class_and_one_shared():
    totals = {name: ledger.total_parameters(PRESETS[name]) for name in ("cifar10", "cifar100", "imagenet100")}
    assert totals == {"cifar10": 35_841_679, "cifar100": 36_609_775, "imagenet100": 90_692_631}


@pytest.mark.parametrize(
    ("name", "numbers", "convolutions"), [("cifar100", 35_746_307, 65), ("imagenet100", 89_535_619, 67)]
)
def test_the_base_has_the_papers_size(name, numbers, convolutions):
    net = meta_unet(PRESETS[name])
    assert sum(value.numel() for key, value in net.named_parameters() if key != "label_emb.weight") == numbers
    assert len(conv_layers(net)) == convolutions
    assert net.embedding == 512


def test_the_texts_claims_about_extra_parameters_are_rows():
    table = ledger.of_paper().query("table == 'text'").set_index(["measure", "preset"])
    assert table.ours["share", "cifar100"] == 2.27
    assert table.ours["more"].to_dict() == {"cifar100": 47_149_775, "imagenet100": 104_856_631}
    assert table.verdict.tolist() == ["equal", "below", "below"]
    assert ledger.verdict("52.4M", 60_000_000, "more") == "differs"


def test_every_printed_number_is_equal_but_the_known_slip_and_the_open_row():
    table = ledger.of_paper()
    unlike = table[~table.verdict.isin(["equal", "fitted", "below"])]
    verdicts = {"5.284K": "differs", "0.0K": "differs", "2.474K": "open", "3.6K": "open"}
    assert dict(zip(unlike.paper, unlike.verdict, strict=True)) == verdicts
    assert table.ours[table.paper == "5.284K"].item() == 5_164
    fitted = table[table.verdict == "fitted"]
    assert len(fitted) == 10, "the rows whose layers were chosen so that their numbers come out"
    assert fitted.row.str.contains("rank 1 and 2|LoRA Conv2d").all()
    counts = {"I": 11, "II": 14, "IV": 10, "V": 18, "VI": 3, "text": 3, "supplement": 6}
    assert table.table.value_counts().to_dict() == counts


@pytest.mark.parametrize(
    ("number", "ours", "verdict"),
    [
        ("2.3%", 2.27, "equal"),
        ("10.03K", 10_028, "equal"),
        ("10.03K", 10_024, "differs"),
        ("35.84M", 35_841_679, "equal"),
        ("13", 14, "differs"),
        ("3.6K", None, "open"),
    ],
)
def test_a_number_is_equal_when_it_rounds_to_what_is_printed(number, ours, verdict):
    assert ledger.verdict(number, ours) == verdict


def test_what_is_counted_is_what_is_trained():
    net = build_unet(PRESETS["smoke"], 6)
    for method in METHODS:
        adapters = Adapters(net, PRESETS["smoke"].but(method=method))
        trained = sum(value.numel() for value in adapters.start(7).values())
        label = net.embedding if adapters.learns_label else 0
        assert trained == adapters.parameters_per_class == ledger.parameters_per_class(adapters.experiment)
        assert (method == "label-embedding") == (trained == label > 0)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_ledger_of_all_methods(name):
    table = ledger.of_preset(name).set_index("method")
    assert list(table.index) == list(METHODS)
    assert (table.layers.drop("label-embedding") > 0).all()
    new = ledger.CLASSES[PRESETS[name].data] - int(PRESETS[name].split.split("-")[0])
    rows = table.PPC.where(table.index != "label-embedding", 0)  # the embedding of a class is in every total
    assert ((table.total - table.total["label-embedding"]) == (new + 1) * rows).all()
    assert (table.class_file_bytes > 4 * table.PPC).all()


def test_the_command_prints_the_papers_tables_and_a_presets_methods(capsys):
    assert main(["ledger"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    slip, *others = (line for line in lines if "differs" in line)
    assert all("vanilla conditioning" in line for line in others)
    assert slip.split()[:7] == ["IV", "ratio", "2", "cifar100", "PPC", "5,164", "5.284K"]
    for word in ("row", "preset", "measure", "paper", "verdict"):  # words stand below their heading
        assert {line[head.index(word) - 1] for line in lines} == {" "}
    assert main(["ledger", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["ours"] for row in rows if row["row"] == "LoRA Conv2d v1"] == [12_288, 12_288, 14_976]
    assert main(["ledger", "digits", "--json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)] == list(METHODS)
    assert main(["ledger", "nosuch"]) == 2
    assert "Unknown preset 'nosuch'" in capsys.readouterr().err
