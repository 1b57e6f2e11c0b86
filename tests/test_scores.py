"""Accuracies against values worked out by hand, and the held-out loss against plain random draws."""

import pytest
import torch
from test_adapters import base

from funlora_lab import preset
from funlora_lab.continual import accuracy_per_task, average_accuracies, held_out_loss, last_and_incremental
from funlora_lab.data import load, tasks, to_floats
from funlora_lab.flow import flow_loss
from funlora_lab.store import Store
from funlora_lab.studies import plots
from funlora_lab.systems import Context, Source
from funlora_lab.training import Runtime


def test_accuracies_of_a_small_matrix():
    matrix = [[0.9], [0.8, 0.6], [0.7, 0.5, 0.3]]
    assert average_accuracies(matrix) == pytest.approx([0.9, 0.7, 0.5])
    assert last_and_incremental(matrix) == (pytest.approx(0.5), pytest.approx(0.7))


def test_a_task_that_is_not_scored_leaves_no_average_over_all():
    assert average_accuracies([None, [0.8, 0.6]]) == [None, pytest.approx(0.7)]
    assert last_and_incremental([None, [0.5, 0.5]]) == (0.5, None)
    assert last_and_incremental([[0.5], None]) == (None, None)


def test_accuracy_on_a_task_counts_the_images_of_its_classes():
    predicted, true = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 0, 1, 2, 2])
    assert accuracy_per_task(predicted, true, [[0], [1, 2]]) == pytest.approx([1 / 2, 1 / 3])


def context_of(tmp_path, **changes) -> Context:
    experiment = preset("smoke").but(**changes)
    dataset = load(experiment)
    return Context(experiment, dataset, tasks(experiment, 10), Store(tmp_path), Runtime())


def test_the_slices_of_the_held_out_loss_move_on_from_draw_to_draw(tmp_path):
    context, net, seen = context_of(tmp_path), base(), []

    def velocity(t, x):
        seen.append(t)
        return net(t, x, net.label_emb.weight[:1].expand(len(x), -1))

    n = len(context.dataset.valid.of(3).pixels)
    assert held_out_loss(context, Source("", lambda: velocity), 3) == held_out_loss(
        context, Source("", lambda: velocity), 3
    )
    times = torch.stack(seen[:8])  # (draws, images): in every draw one image in each slice, and every image everywhere
    assert torch.equal((times * n).floor().sort(1).values, torch.arange(float(n)).expand(8, n))
    assert times.sort(0).values.diff(dim=0).max() < 1 / 8 + 2 / n


def test_the_held_out_loss_agrees_with_400_random_draws_within_its_standard_error(smoke_run):
    found, means, variances = [], [], []
    for cls in smoke_run.order:
        source = smoke_run.source(cls)
        velocity, x1 = source.velocity(), to_floats(smoke_run.context.dataset.valid.of(cls).pixels)
        generator, many = torch.Generator().manual_seed(cls), x1.repeat(20, 1, 1, 1)
        draws = []
        with torch.no_grad():
            for t in torch.rand(20, len(many), generator=generator):
                noise = torch.randn(many.shape, generator=generator)
                draws.append(flow_loss(velocity, many, noise, t).reshape(20, -1).mean(1))
        draws = torch.cat(draws)
        assert len(draws) == 400
        found.append(held_out_loss(smoke_run.context, source, cls))
        means.append(draws.mean().item())
        variances.append(draws.var().item() / 8)  # of the mean of eight draws
        assert abs(found[-1] - means[-1]) < 3 * variances[-1] ** 0.5, cls
    assert abs(sum(found) - sum(means)) < sum(variances) ** 0.5  # over all classes, as a run reports it


def test_without_held_out_images_there_is_no_held_out_loss(tmp_path):
    assert held_out_loss(context_of(tmp_path, valid_fraction=0.0), Source("", lambda: None), 3) is None


def test_figures_of_accuracies_tell_coinciding_lines_apart_and_of_confusions_show_the_errors():
    averages = {"funlora": [1.0, 0.99, 0.986], "bound": [1.0, 1.0, 1.0], "naive": [1.0, None, 0.2]}
    axis = plots.distance_per_task(averages, "bound").axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axis.lines[1:]}
    assert lines["funlora"] == pytest.approx([0, 1, 1.4])
    assert lines["naive"] == pytest.approx([0, float("nan"), 80], nan_ok=True)
    assert [text.get_text() for text in axis.texts] == ["1.4", "80.0"]
    axis, scale = plots.confusion([[35, 1], [4, 32]], ["a", "b"]).axes
    assert sorted(int(text.get_text()) for text in axis.texts) == [1, 4, 32, 35]
    colours = axis.images[0].get_array()
    assert colours.mask.tolist() == [[True, False], [False, True]]  # the right answers are no part of the scale
    assert colours.max() == 4
    assert scale.get_ylabel() == "images"
