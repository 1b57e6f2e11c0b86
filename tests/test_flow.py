"""The loss and the solver on velocity fields whose solution is known."""

import math

import pytest
import torch

from funlora_lab.errors import LabError
from funlora_lab.flow import Solver, flow_loss, noise


def test_loss_of_the_true_velocity_is_zero_and_of_zero_velocity_the_mean_square():
    x1, x0, t = torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4, 4), torch.rand(5)
    assert flow_loss(lambda *_: x1 - x0, x1, x0, t).abs().max() == 0
    zero = flow_loss(lambda t, x: torch.zeros_like(x), x1, x0, t)
    assert torch.allclose(zero, (x1 - x0).square().mean((1, 2, 3)))


def test_loss_is_evaluated_on_the_straight_path():
    x1, x0, t = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.tensor([0.25, 1.0])
    seen = []
    flow_loss(lambda t, x: seen.append(x) or x, x1, x0, t)
    assert torch.equal(seen[0][:, 0, 0, 0], t)


@pytest.mark.parametrize(("name", "order", "a_step"), [("euler", 1, 1), ("midpoint", 2, 2), ("rk4", 4, 4)])
def test_fixed_grid_solvers_converge_at_their_order_and_count_evaluations(name, order, a_step):
    x0 = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def error(steps):
        x1, evaluations = Solver(name, steps).integrate(lambda t, x: x, x0)
        assert evaluations == a_step * steps
        return abs(x1.item() - math.e)

    if name == "rk4":  # the state is kept in float32, whose rounding hides finer steps
        assert error(4) < 1e-4
    else:
        assert math.log2(error(8) / error(16)) == pytest.approx(order, abs=0.2)


def test_adaptive_solver_reaches_its_tolerance_and_counts():
    x1, evaluations = Solver("dopri5", tolerance=1e-6).integrate(lambda t, x: x, torch.ones(2, 1, 1, 1))
    assert x1.flatten().tolist() == pytest.approx([math.e, math.e], abs=1e-4)
    assert evaluations > 6


@pytest.mark.parametrize("name", ["euler", "dopri5"])
def test_a_diverging_velocity_is_a_sentence(name):
    with pytest.raises(LabError, match=name):
        Solver(name, 4).integrate(lambda t, x: x * math.inf, torch.ones(1, 1, 2, 2))


def test_noise_depends_on_seed_class_and_chunk_alone():
    first = noise(0, 3, 1, (4, 1, 8, 8))
    torch.manual_seed(99)
    assert torch.equal(first, noise(0, 3, 1, (4, 1, 8, 8)))
    for other in (noise(1, 3, 1, (4, 1, 8, 8)), noise(0, 4, 1, (4, 1, 8, 8)), noise(0, 3, 2, (4, 1, 8, 8))):
        assert not torch.equal(first, other)
