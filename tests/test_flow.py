"""The loss and the solvers on velocity fields whose solution is known; what goes wrong ends in a sentence."""

import math

import pytest
import torch
from torchdiffeq import odeint

from funlora_lab.errors import LabError
from funlora_lab.flow import EVALUATIONS_A_STEP, SOLVERS, Solver, flow_loss, noise

GRIDS, ADAPTIVE = list(EVALUATIONS_A_STEP), ["dopri5", "dopri5-each"]
ORDER = {"euler": 1, "midpoint": 2, "rk4": 4}


def linear(t, x):
    return -3 * x + t.reshape(-1, 1, 1, 1)


def exact(x0):
    """The solution of dx/dt = -3x + t at t = 1."""
    return (x0 + 1 / 9) * math.exp(-3) + 1 / 3 - 1 / 9


def swirl(t, x):
    """A velocity that differs from image to image: stiffer where the image is brighter."""
    rate = 1 + 20 * x.mean((1, 2, 3), keepdim=True).sigmoid()
    return rate * (torch.sin(3 * t.reshape(-1, 1, 1, 1)) - x)


def images(B, seed=0):
    return noise(seed, 0, 0, (B, 1, 4, 4))


def test_loss_is_the_square_beside_the_true_velocity_on_the_straight_path():
    x1, x0, t = torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4, 4), torch.rand(5)
    seen = []
    assert flow_loss(lambda t, x: seen.append(x) or x1 - x0, x1, x0, t).abs().max() == 0
    zero = flow_loss(lambda t, x: torch.zeros_like(x), x1, x0, t)
    torch.testing.assert_close(zero, (x1 - x0).square().mean((1, 2, 3)))
    torch.testing.assert_close(seen[0][2], t[2] * x1[2] + (1 - t[2]) * x0[2])


def test_noise_depends_on_seed_class_and_chunk_alone():
    first = noise(0, 3, 1, (4, 1, 8, 8))
    torch.manual_seed(99)
    assert torch.equal(first, noise(0, 3, 1, (4, 1, 8, 8)))
    for other in ((1, 3, 1), (0, 4, 1), (0, 3, 2)):
        assert not torch.equal(first, noise(*other, (4, 1, 8, 8)))


def test_a_solver_is_known_by_name_and_by_what_its_images_depend_on():
    assert list(SOLVERS) == GRIDS + ADAPTIVE
    assert [Solver(name).adaptive for name in SOLVERS] == [False] * 3 + [True] * 2
    assert Solver("rk4", 6, 0.1).identity == {"solver": "rk4", "steps": 6}
    assert Solver("dopri5", 6, 0.1).identity == {"solver": "dopri5", "tolerance": 0.1}
    with pytest.raises(LabError, match="solver=heun: accepted is one of euler, midpoint, rk4, dopri5, dopri5-each"):
        Solver("heun")


@pytest.mark.parametrize("name", GRIDS)
def test_fixed_grids_converge_at_their_order_and_count_their_evaluations(name):
    x0, errors = images(2).double(), []
    for steps in (8, 16):
        x1, evaluations = Solver(name, steps).integrate(lambda t, x: linear(t, x.double()), x0)
        errors.append((x1 - exact(x0)).abs().max().item())
        assert evaluations == steps * EVALUATIONS_A_STEP[name]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDER[name], abs=0.5)


@pytest.mark.parametrize("name", GRIDS)
def test_steps_on_a_grid_have_the_bits_of_torchdiffeq(name):
    x0 = images(3)
    for steps in (1, 4, 7, 10):
        grid = torch.linspace(0, 1, steps + 1)
        states, _ = Solver(name, steps).path(swirl, x0)
        assert torch.equal(states, odeint(swirl, x0, grid, method=name))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_solvers_keep_their_tolerance(name):
    x0 = images(5)
    for tolerance in (1e-2, 1e-4):
        x1, evaluations = Solver(name, tolerance=tolerance).integrate(linear, x0)
        assert (x1 - exact(x0)).abs().max() < 5 * tolerance
        assert 7 < evaluations < 200


@pytest.mark.parametrize("name", SOLVERS)
def test_a_path_runs_from_the_noise_to_the_images_through_any_number_of_frames(name):
    x0, solver = images(3), Solver(name, 4, 1e-4)
    x1, _ = solver.integrate(linear, x0)
    for frames, count in ((None, 11 if solver.adaptive else 5), (7, 7)):
        states, _ = solver.path(linear, x0, frames)
        assert len(states) == count
        assert torch.equal(states[0], x0)
        torch.testing.assert_close(states[-1], x1, atol=1e-3 if solver.adaptive else 0, rtol=0)


def test_each_image_of_dopri5_each_is_bit_for_bit_independent_of_its_neighbours_and_of_dopri5_it_is_not():
    mine, calm, wild = images(6), 0.1 * images(6, seed=1), 8 * images(6, seed=2)
    for name, independent in (("dopri5-each", True), ("dopri5", False)):
        solver = Solver(name, tolerance=1e-3)
        drawn = [solver.integrate(swirl, torch.cat([mine[:1], others[1:]]))[0][0] for others in (calm, wild)]
        assert torch.equal(*drawn) == independent


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_flow_through_every_solver(name):
    """dx/dt = a x with a of its own for each image: x1 = g(a) x0, so dx1/dx0 = g(a) and dx1/da = g'(a) x0."""
    x0 = images(3).requires_grad_()
    a = torch.tensor([-2.0, 0.5, 1.5]).reshape(-1, 1, 1, 1).requires_grad_()
    if name in ADAPTIVE:
        growth = a.exp()
    else:  # two steps of the Taylor series up to the solver's order
        growth = sum((a / 2) ** i / math.factorial(i) for i in range(ORDER[name] + 1)) ** 2
    x1, _ = Solver(name, 2, 1e-6).integrate(lambda t, x: a * x, x0)
    got = torch.autograd.grad(x1.sum(), (x0, a))
    torch.testing.assert_close(got, torch.autograd.grad((growth * x0).sum(), (x0, a)), atol=1e-4, rtol=1e-4)


def corrected(velocity, correct):
    """A velocity with ``correct(t, x, v)`` in its place at every evaluation: what guidance needs of a solver."""
    return lambda t, x: correct(t, x, velocity(t, x))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_correction_changes_the_velocity_at_every_evaluation(name):
    x0, solver, seen = images(2), Solver(name, 2, 1e-5), []
    x1, _ = solver.integrate(corrected(lambda t, x: torch.zeros_like(x), lambda t, x, v: v + 2), x0)
    torch.testing.assert_close(x1, x0 + 2)

    def time_alone(t, x, v):
        seen.append(t)
        return v - x + t.reshape(-1, 1, 1, 1)

    states, evaluations = solver.path(corrected(lambda t, x: x, time_alone), x0, 5)
    assert len(seen) == evaluations
    integral = 1 / 4 if name == "euler" else 1 / 2  # of t from 0 to 1; euler takes t at 0 and 1/2
    torch.testing.assert_close(states[-1], x0 + integral)


def test_a_correction_by_hand():
    """Two euler steps of v = x, doubled at every evaluation: each adds half of 2x, so x0 becomes 4 x0."""
    x0 = images(2)
    x1, _ = Solver("euler", 2).integrate(corrected(lambda t, x: x, lambda t, x, v: 2 * v), x0)
    assert torch.equal(x1, 4 * x0)


def explosion(t, x):
    """dx/dt = 10 (1 + x^2), a tangent: it leaves every bound long before t = 1."""
    return 10 * (1 + x * x)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_underflow_in_dt_names_what_to_choose_instead(name):
    expected = rf"^The solver {name} gave up \(underflow in dt.*grid \(euler, midpoint, rk4\) or a larger tolerance\.$"
    with pytest.raises(LabError, match=expected):
        Solver(name, tolerance=1e-3).integrate(explosion, images(2))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_end_in_a_sentence(name, bad):
    with pytest.raises(LabError, match=f"^The solver {name}.*[.]$"):
        Solver(name, 4, 1e-3).integrate(lambda t, x: torch.where(t.max() > 0.3, bad, 1.0) * x, images(2))
