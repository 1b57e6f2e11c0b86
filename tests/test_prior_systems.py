"""The systems the paper compares with: their losses and guidance, what is shared, budgets, and exact resumption."""

import random
import shutil

import pytest
import torch
import torch.nn.functional as F

from funlora_lab import continual, open_run, preset
from funlora_lab.errors import LabError, Stopped
from funlora_lab.store import read_tensors
from funlora_lab.studies import prior
from funlora_lab.systems import Context, Generator, SelfReplay, generator_of
from funlora_lab.systems.denoiser import towards_new
from funlora_lab.systems.jdcl import chosen, global_loss, local_loss
from funlora_lab.systems.sampling import glimpse
from funlora_lab.training import Runtime
from funlora_lab.workbench.page import Workbench

SMALL = preset("smoke").but(
    split="6-2", base_channels=4, multipliers=(1,), window="4-7", base_images=128, base_batch=64, adapter_images=64,
    samples_per_class=4, chunk=4, classifier_epochs=2, classifier_batch=20, valid_fraction=0.02,
    denoising_steps=2, diffusion_steps=20, replay_every=3, head_hidden=8, log_every=3,
)  # fmt: skip
SYSTEMS = ("dgr-diffusion", "guide", "ddgr", "jdcl")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("prior")


@pytest.fixture(scope="module")
def runs(home):
    return {method: open_run(SMALL.but(method=method), "cpu", home=home) for method in SYSTEMS}


def generator(run) -> Generator:
    """The run's system, having learned nothing, with the settings of the run."""
    return generator_of(run.context)


class Killed(BaseException):
    """Ends a run as the death of its process does: nothing is saved any more."""


@pytest.mark.parametrize(("method", "longest"), [*((method, 20) for method in SYSTEMS), ("gan-memory", 4)])
def test_killed_and_stopped_at_random_moments_every_system_ends_the_same(method, longest, home, numbers, tmp_path):
    """Also between two drawings of replayed images, which the saved progress therefore has to hold."""
    e, moments, ends, states, between = SMALL.but(method=method), random.Random(method), [], set(), []
    whole = open_run(e, "cpu", home=home)
    shutil.copytree(home, tmp_path / "own")
    for kind in ("lasting", "pool", "samples", "network", "adapter", "adapters"):  # the judge and the like stay
        for folder in (tmp_path / "own" / "artefacts").glob(f"{kind}-*"):
            shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "own" / whole.run.folder.name)
    results = None
    while not results and len(ends) < 60:
        left, end = iter(range(moments.randrange(longest))), (Killed, Stopped)[len(ends) % 2]

        def stop(left=left, end=end):
            if next(left, None) is not None:
                return None
            if end is Killed:
                raise Killed
            return "Enough."

        try:
            results = continual.run(e, runtime=Runtime(stop=stop, save_seconds=0.01), home=tmp_path / "own")
        except (Killed, Stopped) as reason:
            ends.append(type(reason))
            for path in (tmp_path / "own").rglob("state.safetensors"):
                states.add(path.parent.name.split("-")[0])
                if "lasting" in path.parent.name:
                    between.append(read_tensors(path)[1]["step"] % e.prior.replay_every)
    assert set(ends) == {Killed, Stopped}
    assert any(between) or method in ("jdcl", "gan-memory")
    assert states
    expected, found = numbers(home), numbers(tmp_path / "own")
    assert found.items() <= expected.items()
    for name in ("confusion", "LA", "own_LA"):
        assert results.get(name) == whole.results.get(name)


def test_every_stage_of_jdcl_can_be_watched(tmp_path):
    looks = []
    e = SMALL.but(method="jdcl", score_after="none")
    run = open_run(e, "cpu", home=tmp_path, watch=lambda event, images: looks.append((event["stage"], images)))
    stages = list(dict.fromkeys(stage for stage, _ in looks))
    assert stages == ["base", "local-2", "global-2", "local-3", "global-3"]
    assert torch.equal(looks[-1][1], glimpse(run.generator, run.order))


def test_both_numbers_are_reported_after_every_task(runs):
    for run in runs.values():
        assert len([event["own_average"] for event in run.accuracies]) == 3
        assert run.accuracies[-1]["own_average"] == run.results["own_LA"]
        assert run.results["flow_loss"] is None  # an error of predicted noise is no flow loss
        assert run.recognition.notna().sum().tolist() == [6, 8, 10]


def test_samples_offer_no_solver_to_a_system_that_brings_its_own(runs):
    panel = Workbench(runs["jdcl"]).samples
    assert "of 8 recognised" in panel.pictures
    assert ('name="solver"' in panel.how, 'name="seed"' in panel.how) == (False, True), "no control that does nothing"


def test_the_generator_of_guide_is_trained_once_for_dgr_too(runs):
    plain, guided = runs["dgr-diffusion"], runs["guide"]
    assert plain.generator.key == guided.generator.key
    assert plain.results["LA"] == guided.results["LA"]
    assert plain.generator.lasting.key != guided.generator.lasting.key
    first = [run.generator_after(1) for run in (plain, guided)]
    assert first[0].lasting.key == first[1].lasting.key  # guidance begins with the second task


def test_a_network_of_noise_is_never_taken_for_one_of_velocities(runs):
    context = runs["guide"].context
    flow = SelfReplay(Context(**vars(context) | {"experiment": SMALL.but(method="self-replay")}))
    assert flow.artefact("base", [0], 2).key != generator(runs["guide"]).artefact("base", [0], 2).key
    assert len({runs[method].generator_after(1).key for method in SYSTEMS}) == 3  # cosine, linear, with a head


def test_guidance_is_the_gradient_towards_the_likeliest_new_class():
    logits = torch.tensor([[2.0, 0.5, 0.1, 0.3], [0.0, 3.0, 1.0, -1.0]], requires_grad=True)
    score = towards_new(logits, 2, 0.5)
    expected = 0.5 * torch.stack([logits.log_softmax(1)[0, 3], logits.log_softmax(1)[1, 2]])
    assert torch.allclose(score, expected)
    (slope,) = torch.autograd.grad(score.sum(), logits)
    assert (slope[0] > 0).tolist() == [False, False, False, True]
    assert (slope[1] > 0).tolist() == [False, False, True, False]


def test_the_classifier_is_shown_its_share_of_replay_and_draws_anew_every_few_steps(runs):
    own = generator(runs["guide"])
    own.learn(0)
    replay = own.replay(1, 20)
    assert (replay.count, replay.every, replay.evaluations) == (10, 3, 6)  # half of 20; three evaluations a step
    images, positions = replay.draw(3)
    assert images.shape == (10, 1, 8, 8)
    assert set(positions.tolist()) <= set(range(6))
    assert torch.equal(images, replay.draw(3)[0])
    assert not torch.equal(images, replay.draw(6)[0])
    with torch.no_grad():
        own.lasting.net[-1].weight.mul_(-1)  # another classifier guides elsewhere
    assert not torch.equal(images, replay.draw(3)[0])


def test_ddgr_replays_images_that_the_previous_classifier_guided(runs):
    run = runs["ddgr"]
    own = generator(run)
    own.learn(0)
    own.replay(1, 20)
    guided, plain = own.replayed(0), own.source(0)
    assert own.guiding.key in guided.key
    x = torch.randn(4, 1, 8, 8)
    drawn, other = (source.solver.integrate(source.velocity(), x)[0] for source in (guided, plain))
    assert (drawn - other).abs().max() > 1e-5
    assert (plain.solver.schedule.kind, plain.solver.name) == ("cosine", "ddpm")
    strong = guided._replace(solver=own.sampler)
    assert torch.equal(strong.solver.integrate(strong.velocity(), x)[0], other)


def test_the_losses_of_jdcl_are_the_published_sums():
    generator = torch.Generator().manual_seed(1)
    n, K, old = 7, 5, 3
    predicted, noise, taught = (torch.randn(n, 1, 2, 2, generator=generator) for _ in range(3))
    logits, y = torch.randn(n, K, generator=generator), torch.tensor([0, 1, 2, 3, 4, 3, 3])
    shares = torch.randn(n, K, generator=generator).softmax(1)
    new = [i for i in range(n) if y[i] >= old]
    kept = [i for i in range(n) if y[i] < old]
    local = sum(float((predicted[i] - noise[i]).square().mean()) for i in range(n)) / n
    local += 0.001 * F.cross_entropy(logits, y).item()
    assert local_loss(predicted, noise, logits, y).mean().item() == pytest.approx(local, rel=1e-5)
    for late in (False, True):
        loss = 0.01 * F.mse_loss(predicted, noise).item()
        for part in (kept, new):
            share = 2 * len(part) / n
            loss += share * F.mse_loss(predicted[part], taught[part]).item()
            loss += 0.001 * share * F.cross_entropy(logits[part], shares[part]).item()
        loss += 1e-5 * F.cross_entropy(logits, y).item() if late else 0
        found = global_loss(predicted, noise, logits, y, taught, shares, late)
        assert found.shape == (n,)
        assert found.mean().item() == pytest.approx(loss, rel=1e-6)


def test_a_set_is_what_the_head_takes_for_the_class_filled_up_with_the_likeliest():
    shares = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.8, 0.2, 0.0], [0.6, 0.1, 0.3], [0.1, 0.9, 0.0]])
    assert [chosen(shares, k, 2).tolist() for k in range(3)] == [[0, 2], [1, 4], [3, 1]]  # the last is never predicted
    assert [chosen(shares, k, 3).tolist() for k in range(3)] == [[0, 2, 3], [1, 4, 2], [3, 1, 0]]


def test_jdcl_draws_without_a_class_and_a_larger_set_holds_the_smaller_one(runs):
    run = runs["jdcl"]
    few, more = run.samples(9, 4), run.samples(9, 8)
    assert torch.equal(few, more[:4])
    assert run.results["PPC"] == 9  # a line of the head
    with pytest.raises(LabError, match=r"base_weights=.*x: accepted is nothing for the method jdcl"):
        generator_of(Context(**vars(run.context) | {"experiment": run.experiment.but(base_weights="x")})).check()


def test_budgets_count_the_classes_seen_or_the_new_ones(runs):
    def images(run):
        return [event["images"] for event in run.events if event["event"] == "loss" and event["step"] == event["steps"]
                and "classifier" not in event["stage"]]  # fmt: skip

    assert images(runs["guide"]) == [128, 8 * 64, 10 * 64]
    assert images(runs["jdcl"]) == [128, 2 * 64, 8 * 64, 2 * 64, 10 * 64]  # local, then global
    own = generator(runs["guide"])
    frugal = type(own)(Context(**vars(own.context) | {"experiment": own.context.experiment.but(replay_budget="new")}))
    assert (own.steps(2), frugal.steps(2)) == (10, 2)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"denoising_steps": 21}, "denoising_steps=21: accepted is a whole number from 1 to diffusion_steps=20"),
        ({"denoiser": "euler"}, "denoiser=euler: accepted is one of ddim, ddpm"),
        ({"noise_schedule": "flat"}, "noise_schedule=flat: accepted is one of linear, ho, cosine, stable"),
        ({"replay_budget": "all"}, "replay_budget=all: accepted is one of seen, new"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(setting, words, tmp_path):
    with pytest.raises(LabError, match=words):
        continual.run(SMALL.but(method="guide", **setting), home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_tables_show_both_numbers_the_costs_and_the_published_order(runs, home, monkeypatch):
    monkeypatch.setenv("FUNLORA_HOME", str(home))
    rows = {method: run.experiment for method, run in runs.items()}
    frame = prior.collect(prior.cells(rows, [0]))
    table = prior.readable(frame)
    assert table.loc["guide", "published LA, CIFAR10"] == "64.47"
    assert table.loc["jdcl", "own LA %"] == f"{100 * runs['jdcl'].results['own_LA']:.1f}"
    costs = frame.set_index("row")
    assert costs["trained"].to_dict() == {"dgr-diffusion": 1280, "guide": 1280, "ddgr": 1280, "jdcl": 1536}
    assert costs.loc["guide", "drawn"] == costs.loc["dgr-diffusion", "drawn"] > 4 * (6 + 8 + 10)
    replayed = costs.loc["guide", "drawn"] - 4 * (6 + 8 + 10)
    assert costs.loc["guide", "evaluations"] == 2 * 4 * (6 + 8 + 10) + 6 * replayed
    verdicts = prior.order(frame)
    assert list(verdicts.index) == ["JDCL > GUIDE", "GUIDE > DGR diffusion", "DGR diffusion > DDGR"]
    more = runs["guide"].results["own_LA"] - runs["dgr-diffusion"].results["own_LA"]
    said = "shown" if more > 0 else "contradicted" if more < 0 else "not decided"
    assert verdicts.loc["GUIDE > DGR diffusion", "own classifiers"].endswith(said)
    partly = prior.collect(prior.cells(rows | {"ddgr": SMALL.but(method="ddgr", replay_every=2)}, [0]))
    assert set(prior.readable(partly).loc["ddgr", ["own LA %", "LA % on samples", "evaluations"]]) == {"not run"}
    assert prior.order(partly).loc["DGR diffusion > DDGR"].tolist() == ["not run"] * 2
    assert prior.order(partly).iloc[:2].equals(verdicts.iloc[:2])
    assert prior.plot_averages(partly).png()
    words = prior.both(prior.cells(rows, [0, 1]))  # of the seed that was run
    assert words["guide"].startswith(f"{100 * runs['guide'].results['own_LA']:.1f} own")
    assert prior.both(prior.cells(rows, [1])) == {}
