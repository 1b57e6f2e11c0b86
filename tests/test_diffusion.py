"""Diffusion: schedules against closed forms, samplers against a Gaussian, guidance against a calculation by hand."""

import math

import pytest
import torch

from funlora_lab.diffusion import SAMPLERS, Sampler, Schedule, betas, noise_loss
from funlora_lab.errors import LabError
from funlora_lab.seeds import stream


def test_the_schedules_are_those_of_the_papers():
    assert torch.allclose(betas("linear", 1000), torch.linspace(0.001, 0.02, 1000, dtype=torch.float64))
    assert torch.allclose(betas("ho", 1000), torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64))
    t = torch.arange(1000, dtype=torch.float64) / 999
    root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t
    assert torch.allclose(betas("stable", 1000), root**2)

    def kept(time):  # Nichol & Dhariwal's Eq. 17
        return math.cos((time / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = torch.tensor([kept(time + 1) / kept(0) for time in range(999)], dtype=torch.float64)
    assert torch.allclose(Schedule("cosine").abar[:-1], expected)
    assert Schedule("linear").abar[-1].item() == pytest.approx(2.565e-5, rel=1e-3)
    assert Schedule("ho").abar[-1].item() == pytest.approx(4.036e-5, rel=1e-3)
    assert betas("linear", 500)[0].item() == pytest.approx(0.002)  # half as many steps, each twice as noisy
    with pytest.raises(LabError, match="noise_schedule=steep: accepted is one of linear"):
        Schedule("steep", 10)


@pytest.mark.parametrize("kind", ["linear", "ho", "cosine", "stable"])
def test_noised_images_have_the_variance_of_the_schedule(kind):
    schedule, t = Schedule(kind), torch.tensor([0, 300, 999])
    x, noise = torch.full((3, 1, 2, 2), 0.5), torch.ones(3, 1, 2, 2)
    expected = schedule.abar[t].sqrt() * 0.5 + (1 - schedule.abar[t]).sqrt()
    assert torch.allclose(schedule.noised(x, noise, t)[:, 0, 0, 0].double(), expected, atol=1e-6)
    zero = noise_loss(lambda t, x: noise, schedule, x, noise, t)
    assert torch.equal(zero, torch.zeros(3))
    assert torch.allclose(noise_loss(lambda t, x: noise + 2, schedule, x, noise, t), torch.full((3,), 4.0))


MEAN, DEVIATION = 0.4, 0.25


def perfect(schedule):
    """The best prediction of the noise where every pixel of the images is normal with MEAN and DEVIATION."""

    def network(t, x):
        a = schedule.abar[int(t)].item()
        return math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / (a * DEVIATION**2 + 1 - a)

    return network


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_predictor_gives_the_mean_and_deviation_of_the_images(name, kind):
    sampler = Sampler(Schedule(kind), name, steps=1000, clip=False)
    x = torch.randn(2000, 1, 2, 2, generator=stream(0, "noise"))
    images, evaluations = sampler.integrate(perfect(sampler.schedule), x)
    assert evaluations == 1000
    assert images.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert images.std().item() == pytest.approx(DEVIATION, rel=0.04)
    assert torch.equal(images, sampler.integrate(perfect(sampler.schedule), x)[0])  # also the ancestral one


def test_few_steps_of_ddim_draw_too_narrow_a_distribution():
    x = torch.randn(2000, 1, 2, 2, generator=stream(0, "noise"))
    samplers = [Sampler(Schedule(), "ddim", steps, clip=False) for steps in (20, 50, 250)]
    widths = [sampler.integrate(perfect(sampler.schedule), x)[0].std().item() for sampler in samplers]
    assert widths == sorted(widths)
    assert widths[0] < 0.8 * DEVIATION


def test_the_times_are_those_of_the_public_codes():
    assert Sampler(Schedule(), "ddim", 50).times == list(range(980, -1, -20))  # GUIDE
    assert Sampler(Schedule("cosine", 4000), "ddpm", 250).times[-4:] == [48, 32, 16, 0]  # DDGR
    assert Sampler(Schedule("cosine", 4000), "ddpm", 250).times[:3] == [3999, 3983, 3967]
    states, evaluations = Sampler(Schedule(), "ddim", 10).path(perfect(Schedule()), torch.zeros(2, 1, 2, 2), 6)
    assert states.shape == (6, 2, 1, 2, 2)
    assert evaluations == 10
    for wrong in ({"steps": 1001}, {"name": "other"}):
        with pytest.raises(LabError, match=r"denois\w+=\w+: accepted is"):
            Sampler(Schedule(), **wrong)


def linear(x):
    """A score whose gradient is the same everywhere: 3 for the first pixel and -1 for the second."""
    return 3 * x[:, 0, 0, 0] - x[:, 0, 0, 1]


@pytest.mark.parametrize("predicted", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_at_scale_zero_is_none(predicted, name):
    x, network = torch.randn(4, 1, 1, 2, generator=stream(0, "two pixels")), lambda t, x: 0.3 * x
    plain = Sampler(Schedule(), name, 10)
    guided = Sampler(Schedule(), name, 10, score=lambda x: 0 * linear(x), predicted=predicted)
    assert torch.equal(plain.integrate(network, x)[0], guided.integrate(network, x)[0])
    assert guided.evaluations == (3 if predicted else 1) * plain.evaluations


def test_a_step_guided_on_the_image_is_the_one_calculated_by_hand():
    """Two pixels, e(x) = x / 2: dx0/dx_t = (1 - sqrt(1 - a) / 2) / sqrt(a); the second is clipped: no gradient."""
    schedule, x = Schedule(), torch.tensor([0.02, 5.0]).reshape(1, 1, 1, 2)
    sampler = Sampler(schedule, "ddim", 2, score=linear, predicted=True)
    assert sampler.times == [500, 0]
    _, first, _ = sampler.path(lambda t, x: x / 2, x)[0]
    a, b = schedule.abar[500].item(), schedule.abar[0].item()
    slope = (1 - math.sqrt(1 - a) / 2) / math.sqrt(a)
    gradient = [3 * slope, 0.0]
    for i, pixel in enumerate((0.02, 5.0)):
        x0 = min((pixel - math.sqrt(1 - a) * pixel / 2) / math.sqrt(a), 1.0)
        noise = (pixel - math.sqrt(a) * x0) / math.sqrt(1 - a) - math.sqrt(1 - a) * gradient[i]
        x0 = (pixel - math.sqrt(1 - a) * noise) / math.sqrt(a)
        assert x0 > 2 or i  # what guidance adds is not clipped
        expected = math.sqrt(b) * x0 + math.sqrt(1 - b) * noise
        assert first[0, 0, 0, i].item() == pytest.approx(expected, rel=1e-4)


def test_an_ancestral_step_guided_on_the_noise_moves_the_mean_by_the_variance_times_the_gradient():
    x, network = torch.zeros(1, 1, 1, 2), lambda t, x: x / 2
    plain, guided = (Sampler(Schedule(), "ddpm", 3, score=score) for score in (None, linear))
    assert plain.times == [999, 499, 0]
    before, after = (sampler.path(network, x)[0][1] for sampler in (plain, guided))
    variance = 1 - (plain.schedule.abar[999] / plain.schedule.abar[plain.times[1]]).item()
    assert torch.allclose((after - before)[0, 0, 0], variance * torch.tensor([3.0, -1.0]), atol=1e-5)


def test_a_network_that_has_diverged_is_named():
    with pytest.raises(LabError, match="left the finite numbers"):
        Sampler(Schedule(), "ddpm", 5).integrate(lambda t, x: x * torch.nan, torch.ones(1, 1, 2, 2))
