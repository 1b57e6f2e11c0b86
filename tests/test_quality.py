"""Image quality: the measures against closed forms and torch-fidelity, the table of a run, and where weights lie."""

import json
import math
import shutil
import sys

import pytest
import torch

from funlora_lab import LabError, open_folder, open_run, preset
from funlora_lab.__main__ import main
from funlora_lab.continual import predict
from funlora_lab.studies import fidelity, neighbours, plots, quality
from funlora_lab.systems import build_classifier


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean, covariance, n=400, seed=0):
    """Features whose sample mean and unbiased covariance are exactly those asked for."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


@pytest.fixture(scope="module")
def run(smoke_home, tmp_path_factory):
    home = shutil.copytree(smoke_home, tmp_path_factory.mktemp("quality") / "home")
    return open_run(preset("smoke"), "cpu", home=home)


@pytest.fixture(scope="module")
def table(run):
    return quality.classifier_quality(run, draws=3)


def test_frechet_is_the_closed_form_of_commuting_gaussians():
    means = torch.tensor([[0.0, 1.0, 2.0], [0.5, 1.0, 0.0]], dtype=torch.float64)
    scales = torch.tensor([[1.0, 4.0, 9.0], [4.0, 4.0, 0.25]], dtype=torch.float64)
    expected = (means[0] - means[1]).square().sum() + (scales[0].sqrt() - scales[1].sqrt()).square().sum()
    a, b = (exactly(m, s.diag(), seed=i) for i, (m, s) in enumerate(zip(means, scales, strict=True)))
    assert quality.frechet(a, b) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_is_the_matrix_square_root_of_gaussians_that_do_not_commute():
    s1, s2 = (w @ w.T + 0.1 * torch.eye(5) for w in (normal(5, 5, seed=1), normal(5, 5, seed=2)))
    root = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    a, b = exactly(torch.zeros(5), s1, seed=3), exactly(torch.ones(5), s2, seed=4)
    assert quality.frechet(a, b) == pytest.approx((5 + s1.trace() + s2.trace() - 2 * root).item(), rel=1e-10)


@pytest.mark.parametrize("n", [40, 300])  # fewer and more images than features
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_frechet_of_a_set_with_itself_is_zero(n, scale):
    x = scale * normal(n, 128) + 7
    assert quality.frechet(x, x) < 1e-6
    assert quality.frechet(x, x[torch.randperm(n)]) < 1e-6


def test_kernel_distance_is_zero_on_average_for_one_distribution_and_the_moment_formula_for_two():
    pairs = [(normal(200, 1, seed=2 * i), normal(160, 1, seed=2 * i + 1)) for i in range(100)]
    same = torch.tensor([quality.kernel_distance(a, b) for a, b in pairs])
    assert same.mean().abs() < 3 * same.std() / 10
    shift = 0.5  # E (1 + xy)^3 differs between N(0, 1) and N(m, 1) by 3 m^2 + 3 m^4 + (m^3 + 3 m)^2
    expected = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    apart = torch.tensor([quality.kernel_distance(a, b + shift) for a, b in pairs])
    assert (apart.mean() - expected).abs() < 3 * apart.std() / 10


def test_precision_and_recall_of_a_set_with_itself_are_one_and_of_distant_sets_zero():
    x = normal(50, 8)
    assert quality.precision_recall(x, x) == (1, 1)
    assert quality.precision_recall(x, x + 100) == (0, 0)


def test_precision_and_recall_are_counted_by_hand_on_a_line():
    real = torch.arange(10.0)[:, None]  # balls of radius 2 (inside) or 3 (the ends) with k = 3
    drawn = torch.tensor([[0.0], [0.1], [0.2], [0.3], [20.0], [20.1], [20.2], [20.3]])  # half far away
    precision, recall = quality.precision_recall(real, drawn)
    assert precision == 0.5
    assert recall == 1 / 10  # of the real points only 0 lies within 0.3 of the drawn cluster


def plainly(real, drawn, k=3):
    """Precision and recall by their definition: all distances at once, in float64."""

    def squares(a, b):
        return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T

    around_real, around_drawn = (squares(x, x).kthvalue(k + 1, dim=1).values for x in (real, drawn))  # 1st: itself
    between = squares(real, drawn)
    precision = (between <= around_real[:, None]).any(0).double().mean().item()
    return precision, (between <= around_drawn[None, :]).any(1).double().mean().item()


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.95, 3.0), (1.0, 300.0)])
def test_precision_and_recall_in_blocks_are_those_of_the_exact_form(monkeypatch, scale, offset):
    monkeypatch.setattr(neighbours, "BLOCK", 2000 * 300)  # seven blocks of rows, the last one smaller
    real, drawn = normal(2000, 512) + offset, scale * normal(2000, 512, seed=1) + offset
    found = quality.precision_recall(real, drawn)
    assert found == plainly(real - offset, drawn - offset)
    assert 0.01 < min(found)
    assert max(found) < 0.99


def test_ties_copies_and_points_on_the_edge_of_a_ball_are_decided_exactly():
    grid = torch.cartesian_prod(*[torch.arange(6.0)] * 3)  # every distance is shared by many
    assert quality.precision_recall(grid, grid + torch.tensor([1.0, 0, 0])) == (1, 1)  # on the edge counts
    same = torch.ones(50, 4)
    assert quality.precision_recall(same, same) == (1, 1)
    assert quality.precision_recall(same, same + 1e-9) == (1, 1)  # float32 sees no difference and has none
    assert quality.precision_recall(same.double(), same.double() + 1e-9) == (0, 0)
    distance, index = neighbours.nearest(grid, grid[[5, 0, 5]], k=2)
    assert index[0].tolist() == [1, 0]
    assert distance[5].tolist() == [0, 0]


def test_dropping_half_of_the_modes_costs_recall_and_not_precision():
    real = torch.cat([normal(200, 4), normal(200, 4, seed=1) + 50])
    precision, recall = quality.precision_recall(real, normal(400, 4, seed=2))
    assert precision > 0.8
    assert recall < 0.55


def test_precision_needs_more_images_than_neighbours():
    with pytest.raises(LabError, match="more than 3 images"):
        quality.precision_recall(normal(3, 2), normal(9, 2))


def test_the_spread_over_halves_is_the_standard_error_of_the_whole():
    x = normal(400, 1)
    found = quality.interval([half.mean().item() for half, *_ in quality.halvings(x, x, 400, seed=0)])
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)


def test_halves_are_disjoint_and_of_one_size():
    real, drawn = torch.arange(21.0)[:, None], torch.arange(8.0)[:, None]
    for half, other, picked in quality.halvings(real, drawn, 5, seed=1):
        assert [len(half), len(other), len(picked)] == [8, 8, 8]
        assert not set(half.flatten().tolist()) & set(other.flatten().tolist())


def test_other_real_images_score_better_than_shifted_ones():
    real = normal(200, 6)
    table = quality.compare(real, normal(200, 6, seed=1) + 1, draws=10).set_index(["of", "measure"])
    for name in ("Frechet", "kernel"):
        assert table.loc[("real", name), "high"] < table.loc[("samples", name), "low"]
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_nearest_neighbours_and_copies_are_found():
    train = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    train[1], train[2] = 100, 200
    distance, index = quality.nearest(train, torch.stack([train[1], train[2] + 10]))
    assert index.tolist() == [1, 2]
    assert distance.tolist() == [0, 10]
    generator = torch.Generator().manual_seed(0)
    train, test, fresh = (torch.randint(0, 256, (60, 1, 4, 4), generator=generator, dtype=torch.uint8) for _ in "123")
    assert quality.memorisation(train, test, train[:9]) | {"unseen": 0} == {
        "samples": 0, "unseen": 0, "nearer": 1, "copies": 1,
    }  # fmt: skip
    assert 0.25 < quality.memorisation(train, test, fresh)["nearer"] < 0.75


def test_classifier_features_are_what_the_last_layer_sees(run):
    pixels = run.context.dataset.test.pixels[:30]
    seen = quality.features(run.judge, pixels, batch=7)
    assert seen.dtype == torch.float64
    logits = seen.float() @ run.judge[-1].weight.T + run.judge[-1].bias
    assert torch.equal(logits.argmax(1), predict(run.judge, pixels, "cpu"))
    resnet = build_classifier(preset("smoke").but(classifier="resnet18"), 4)
    assert quality.features(resnet, pixels[:2]).shape == (2, 512)


def test_the_table_of_a_run_has_every_class_and_task_and_never_says_fid(table):
    assert set(table["group"]) == {"all", *(f"task {k}" for k in (1, 2, 3)), *(f"class {d}" for d in "0123456789")}
    assert set(table["features"]) == {"classifier features"}
    assert "FID" not in table.to_string()
    assert len(quality.wide(table)) == 2 * 14
    whole = table.set_index(["group", "of", "measure"])["value"]
    assert whole["all", "real", "Frechet"] < whole["all", "samples", "Frechet"]
    panels = quality.plot_bars({"FunLoRA": table}, ["all", "task 3"]).axes
    assert [axis.get_title().split()[0] for axis in panels] == list(quality.MEASURES)
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["all", "task 3"]


def test_unseen_real_images_are_nearer_than_untrained_samples(run, table):
    unseen = quality.unseen(run, draws=3).set_index(["of", "measure"])["value"]
    samples = table.set_index(["group", "of", "measure"])["value"]
    assert unseen["test", "Frechet"] < samples["all", "samples", "Frechet"]


def test_the_decay_table_of_a_frozen_base_is_flat(run):
    table = quality.decay(run, draws=2)
    samples = table.query("of == 'samples'")
    assert samples["task"].max() == 3
    assert (samples.groupby("measure")["value"].nunique() == 1).all()
    axis = quality.plot_decay({"FunLoRA": table}, "Frechet").axes[0]
    assert axis.get_legend_handles_labels()[1] == ["other real images", "FunLoRA"]


def test_pictures_of_recognition_and_neighbours(run):
    axis, scale = quality.plot_recognition({"FunLoRA": run.recognition}).axes
    assert scale.get_ylabel() == "share recognised"
    learned = run.recognition.notna().to_numpy().sum()
    assert len(axis.texts) == learned == 6 + 8 + 10  # blank before a class is learned
    train, drawn = run.context.dataset.train.of(8).pixels, run.samples(8, 4)
    distance, index = quality.nearest(train, drawn)
    (axis,) = quality.plot_neighbours([("8", drawn, train[index], distance.tolist())]).axes
    assert [text.get_text() for text in axis.get_xticklabels()] == [f"{d:.0f}" for d in distance]
    sheet = plots.tile(torch.cat([drawn, train[index]]), 4)
    assert sheet.shape == (17, 35, 1)
    assert (sheet[8] == 255).all()  # a white gap
    assert (sheet[9:, 9:17, 0] == train[index[1]][0].numpy()).all()
    assert (plots.tile(drawn[:3], 2)[9:, 9:] == 255).all()  # and where no image is left


def test_a_table_is_kept_and_only_made_again_for_other_samples(run, monkeypatch):
    first = quality.classifier_quality(run, draws=2)
    monkeypatch.setattr(quality, "measure", lambda *_: pytest.fail("measured again"))
    again = open_folder(run.run.folder, "cpu")
    assert quality.classifier_quality(again, draws=2).equals(first)
    with pytest.raises(pytest.fail.Exception):
        quality.classifier_quality(again, draws=1)
    (run.run.folder / "quality.json").write_text("{")
    monkeypatch.undo()
    told = []
    again.runtime.report = told.append
    assert quality.classifier_quality(again, draws=2).equals(first)
    assert quality.classifier_quality(again, draws=2).equals(first)
    done = [(event["group"], event["done"], event["of"]) for event in told if event["event"] == "quality"]
    assert done[:3] == [("all", 1, 2), ("all", 2, 2), ("task 1", 1, 2)]
    assert len(done) == 2 * 14


def test_the_command_prints_the_table_and_says_what_it_does_not_know(run, monkeypatch, capsys):
    monkeypatch.setenv("FUNLORA_HOME", str(run.run.folder.parent))
    assert main(["quality", run.run.folder.name, "--draws", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["classifier features"]) == 14 * 2 * 4
    for words in (["quality", "nothing"], ["quality", run.run.folder.name, "--split", "all"]):
        assert main(words) == 2
    printed = capsys.readouterr().err
    assert "'nothing' is no run" in printed
    assert "accepted is train or test" in printed


def test_a_method_without_samples_is_refused(run):
    real = open_run(preset("smoke").but(method="classifier-multitask"), "cpu", home=run.run.folder.parent)
    with pytest.raises(LabError, match="draws no samples"):
        quality.classifier_quality(real)


# torch-fidelity, with a small extractor in place of Inception


@pytest.fixture(scope="module")
def small():
    """A random linear map of 8 x 8 images, registered with torch-fidelity, and a file of its weights to give it."""
    pytest.importorskip("torch_fidelity", reason="the extra fid (torch-fidelity) is not installed")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Small(FeatureExtractorBase):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
            super().__init__(name, features_list)
            self.map = torch.nn.Linear(192, 24)
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

        @staticmethod
        def get_provided_features_list():
            return ("24",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "24"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (self.map(x.flatten(1).float() / 255).detach(),)

    FEATURE_EXTRACTORS_REGISTRY["small"] = Small
    yield Small
    del FEATURE_EXTRACTORS_REGISTRY["small"]


@pytest.fixture
def weights(small, tmp_path):
    torch.manual_seed(0)
    state = torch.nn.Linear(192, 24).state_dict()
    torch.save({f"map.{name}": value for name, value in state.items()}, tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_measures_equal_those_of_torch_fidelity_on_the_same_features(small):
    real, drawn = normal(120, 16), 1.2 * normal(120, 16, seed=1) + 0.2
    theirs = fidelity.published_measures(real, drawn)
    assert quality.frechet(real, drawn) == pytest.approx(theirs["FID"], rel=1e-8)
    assert quality.kernel_distance(real, drawn) == pytest.approx(theirs["KID"], rel=1e-8)
    assert quality.precision_recall(real, drawn) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_the_fid_of_a_run_is_the_one_torch_fidelity_calculates_by_itself(small, weights, run):
    import torch_fidelity

    table = fidelity.inception_quality(run, weights, draws=2, name="small")
    found = table[table["group"] == "all"].set_index("measure")
    order, train = run.context.classes, run.context.dataset.train
    real, drawn = (torch.cat([part(c) for c in order]) for part in (lambda c: train.of(c).pixels, run.samples))

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images.expand(-1, 3, -1, -1)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    theirs = torch_fidelity.calculate_metrics(
        input1=Images(drawn), input2=Images(real), cuda=False, fid=True, kid=True, prc=True, verbose=False,
        feature_extractor="small", feature_extractor_weights_path=str(weights), kid_subset_size=200,
        save_cpu_ram=True, cache=False,
    )  # fmt: skip
    assert found.loc["FID", "value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert found.loc["KID", "value"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert found.loc["precision", "value"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert found.loc["recall", "value"] == pytest.approx(theirs["recall"], abs=1e-6)
    assert (found["samples"] == 200).all()
    assert (found["split"] == "train").all()
    assert found["extractor"].unique().tolist() == ["small, layer 24"]
    assert "sha256" in found["weights"].iloc[0]
    assert set(fidelity.known([run.run]).values()) == {"not run"}  # published numbers have another extractor
    assert fidelity.known([run.run, run.run], "small")["FID"] == f"{found.loc['FID', 'value']:.2f}"


def test_missing_weights_are_one_sentence_that_says_what_to_fetch_and_where_to_put_it(small, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no net")))
    for path in (tmp_path / "absent.pth", None):
        with pytest.raises(LabError) as caught:
            fidelity.weights_file(path)
        assert fidelity.URL in str(caught.value)
        assert str(tmp_path / "hub" / "checkpoints") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_weights_file_is_never_executed_and_must_fit(small, weights, tmp_path):
    torch.save({"map": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")
    with pytest.raises(LabError, match="not a file of plain weights"):
        fidelity.weights_file(tmp_path / "code.pth")
    with pytest.raises(LabError, match="does not fit the extractor"):
        fidelity.extractor(fidelity.EXTRACTOR, fidelity.weights_file(weights), torch.device("cpu"))
    with pytest.raises(LabError, match="Unknown extractor 'none'"):
        fidelity.extractor("none", weights, torch.device("cpu"))


def test_without_torch_fidelity_the_sentence_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(LabError, match=r"pip install 'funlora-lab\[fid\]'"):
        fidelity.inception_quality(run)
