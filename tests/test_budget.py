"""The sampling budget: nested samples, solvers of one image at a time, what goes wrong ends in a sentence."""

import math

import pandas as pd
import pytest
import torch

from funlora_lab import continual
from funlora_lab.errors import LabError
from funlora_lab.flow import Solver, noise
from funlora_lab.opened import open_run
from funlora_lab.presets import preset
from funlora_lab.studies import budget


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return open_run(preset("smoke"), device="cpu", home=tmp_path_factory.mktemp("home"))


def swirl(t, x):
    """A velocity that differs from image to image: stiffer where the image is brighter."""
    rate = 1 + 20 * x.mean((1, 2, 3), keepdim=True).sigmoid()
    return rate * (torch.sin(3 * t.reshape(-1, 1, 1, 1)) - x)


def linear(t, x):
    return -3 * x + t.reshape(-1, 1, 1, 1)


def exact(x0):
    """The solution of dx/dt = -3x + t at t = 1."""
    return (x0 + 1 / 9) * math.exp(-3) + 1 / 3 - 1 / 9


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_fixed_grids_converge_at_their_order_and_count_their_evaluations(name, order):
    x0 = noise(0, 0, 0, (2, 1, 4, 4)).double()
    errors = []
    for steps in (8, 16):
        x1, evaluations = Solver(name, steps).integrate(lambda t, x: linear(t, x.double()), x0)
        errors.append((x1 - exact(x0)).abs().max().item())
        assert evaluations == steps * budget.EVALUATIONS_A_STEP[name]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.5)


@pytest.mark.parametrize("name", ["dopri5", "dopri5-each"])
def test_adaptive_solvers_keep_their_tolerance(name):
    x0 = noise(0, 0, 0, (5, 1, 4, 4))
    for tolerance in (1e-2, 1e-4):
        x1, _ = Solver(name, tolerance=tolerance).integrate(linear, x0)
        assert (x1 - exact(x0)).abs().max() < 5 * tolerance


def test_each_image_of_dopri5_each_is_bit_for_bit_independent_of_its_neighbours():
    mine, calm, wild = (noise(seed, 0, 0, (6, 1, 4, 4)) for seed in (0, 1, 2))
    drawn = []
    for others, scale in ((calm, 0.1), (wild, 8.0)):
        x0 = torch.cat([mine[:1], scale * others[1:]])
        drawn.append(Solver("dopri5-each", tolerance=1e-3).integrate(swirl, x0)[0][0])
    assert torch.equal(*drawn)


def test_dopri5_does_depend_on_neighbours():
    mine, wild = noise(0, 0, 0, (6, 1, 4, 4)), 8 * noise(2, 0, 0, (6, 1, 4, 4))
    alone, _ = Solver("dopri5", tolerance=1e-3).integrate(swirl, mine)
    beside, _ = Solver("dopri5", tolerance=1e-3).integrate(swirl, torch.cat([mine[:1], wild[1:]]))
    assert not torch.equal(alone[0], beside[0])


def test_dopri5_each_and_dopri5_agree_on_the_network(smoke):
    velocity, x0 = smoke.source(8).velocity(), noise(0, 8, 0, (4, 1, 8, 8))
    each, once = (Solver(name, tolerance=1e-5).integrate(velocity, x0) for name in ("dopri5-each", "dopri5"))
    assert (each[0] - once[0]).abs().max() < 2e-3
    assert 7 < each[1] < 200


def explosion(t, x):
    """dx/dt = 10 (1 + x^2), a tangent: it leaves every bound long before t = 1."""
    return 10 * (1 + x * x)


@pytest.mark.parametrize("name", ["dopri5", "dopri5-each"])
def test_underflow_in_dt_ends_in_a_sentence_that_names_what_to_choose_instead(name):
    expected = (
        rf"The solver {name} gave up \(underflow in dt.*fixed grid \(euler, midpoint, rk4\) or a larger tolerance"
    )
    with pytest.raises(LabError, match=expected) as caught:
        Solver(name, tolerance=1e-3).integrate(explosion, noise(0, 0, 0, (2, 1, 4, 4)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dopri5", "dopri5-each"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_end_in_a_sentence(name, bad):
    with pytest.raises(LabError, match=f"The solver {name}") as caught:
        Solver(name, tolerance=1e-3).integrate(
            lambda t, x: torch.where(t.max() > 0.3, bad, 1.0) * x, noise(0, 0, 0, (2, 1, 4, 4))
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["euler", "midpoint", "rk4"])
def test_a_fixed_grid_that_leaves_the_finite_numbers_ends_in_a_sentence(name):
    with pytest.raises(LabError, match=f"The solver {name} left the finite numbers"):
        Solver(name, 4).integrate(lambda t, x: x * 1e30, noise(0, 0, 0, (2, 1, 4, 4)))


def test_the_images_of_x1_are_the_first_tenth_of_x10_bit_for_bit(smoke):
    few = smoke.samples(8, 6)
    many = smoke.samples(8, 60)  # three chunks
    assert torch.equal(few, many[:6])
    assert len(many.unique(dim=0)) == 60
    changed = smoke.experiment.but(samples_per_class=60)
    assert torch.equal(open_run(changed, "cpu", home=smoke.run.folder.parent).samples(8), many)


def test_a_sweep_draws_every_image_once_and_its_own_cell_is_the_run(smoke, monkeypatch):
    drawn = []
    real = continual.draw.__globals__["draw_chunk"]
    monkeypatch.setitem(continual.draw.__globals__, "draw_chunk", lambda *a: drawn.append(a[2:4]) or real(*a))
    table = budget.sweep(smoke, budget.samplers("midpoint 2, euler 3"), [2, 20, 5])
    assert len(drawn) == 10  # midpoint 2 is the run's own sampler; euler draws one chunk of each of ten classes
    assert table["images"].tolist() == [2, 5, 20] * 2
    assert table["evaluations"].tolist() == [4.0] * 3 + [3.0] * 3
    own = table[(table["solver"] == "midpoint") & (table["images"] == 20)].iloc[0]
    assert own["LA"] == pytest.approx(smoke.results["LA"])
    assert own["recognition"] == pytest.approx(smoke.results["recognition"])
    assert (table["sampling seconds"].diff().drop([0, 3]) > 0).all()


def test_repeats_train_the_classifier_again_on_the_same_images(smoke):
    cell = budget.score(smoke, repeats=2, samples_per_class=5)
    assert cell["spread"] >= 0
    assert math.isnan(budget.score(smoke, samples_per_class=5)["spread"])


def test_the_front_holds_what_nothing_beats():
    table = pd.DataFrame({"cost": [1, 2, 3, 2, 4], "LA": [0.5, 0.7, 0.6, 0.8, 0.9]})
    assert budget.pareto(table, "cost", "LA").index.tolist() == [0, 3, 4]


def test_samplers_and_multiples_that_cannot_be_read_are_named(smoke):
    assert budget.samplers("rk4 2, dopri5-each 1e-2, rk4 2") == [
        {"solver": "rk4", "steps": 2},
        {"solver": "dopri5-each", "tolerance": 0.01},
    ]
    for text in ("heun 2", "rk4", "rk4 0.5"):
        with pytest.raises(LabError, match=f"'{text}' is not a sampler"):
            budget.samplers(text)
    assert budget.counts("1, 0.1", smoke) == [2, 20]
    for text in ("0", "many"):
        with pytest.raises(LabError, match=f"multiples={text}"):
            budget.counts(text, smoke)


def test_table_vii_says_that_ten_times_the_images_buy_eight_points():
    table = budget.published().set_index(["multiple", "steps"])["LA"]
    assert len(table) == 7 * 7
    assert table[10, 6] - table[1, 6] > 0.08
    assert table[1, 20] - table[1, 3] < 0.02
