"""The classifiers that score a generator: trained on its samples alone, tested on real images.

Letters: B images, C channels, K classes.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funlora_lab.data import Images, to_floats
from funlora_lab.seeds import Shuffle, seed_of
from funlora_lab.store import Artefact
from funlora_lab.systems import Context, Source, augment, build_classifier, sample_artefact
from funlora_lab.training import Inputs, Plan, Trainer, autocast, prepared


def train_classifier(
    context: Context, classes: list[int], images: Images | None = None, origin: dict | None = None
) -> tuple[nn.Module, Tensor, Tensor]:
    """Train a classifier of ``classes`` from scratch and let it label the real test images.

    It learns from ``images``, of which ``origin`` says in the artefact's key where they come from, or from real ones.
    Returns (network, predicted classes of the test images of ``classes``, their true classes).
    """
    e, images, origin = context.experiment, images or context.dataset.train.of(classes), origin or {"real": classes}
    settings = dataclasses.asdict(e.classifier) | {"image_size": e.image_size, "channels": e.channels}
    inputs = {"origin": origin, "classes": classes, "settings": settings}
    artefact = context.store.artefact("classifier", **context.inputs, **inputs)
    net = prepared(build_classifier(e, len(classes), len(classes)), context.runtime.device)
    tensors = context.tensors(artefact, lambda: _fit(context, artefact, net, classes, images))
    predicted, true = tensors.pop("predicted"), tensors.pop("true")
    net.load_state_dict(tensors)
    return net.eval(), predicted, true


def _fit(context: Context, artefact: Artefact, net: nn.Module, classes: list[int], images: Images) -> None:
    e, device, c = context.experiment, context.runtime.device, context.experiment.classifier
    pixels, labels = images.on(device, classes)
    batch = min(c.batch, len(images))
    steps = c.epochs * -(-len(images) // batch)
    shuffle = Shuffle(len(images), e.seed, "classifier order", len(classes))
    parameters, momentum = dict(net.named_parameters()), {"momentum": c.momentum, "nesterov": c.momentum > 0}
    optimizer = torch.optim.SGD(parameters.values(), c.lr, weight_decay=c.weight_decay, **momentum)

    def inputs_at(step: int) -> Inputs:
        seed = torch.tensor(seed_of(e.seed, "augment", "classifier", len(classes), step))
        return {"order": shuffle.batch(step, batch), "seed": seed}

    def losses_of(inputs: Inputs) -> Tensor:
        order = inputs["order"]
        with autocast(e.precision, device):
            x = augment(to_floats(pixels[order]), e, inputs["seed"])
            return F.cross_entropy(net(x), labels[order])[None]

    plan = Plan(steps, batch, c.lr, "one-cycle", log_every=e.log_every)
    label, buffers = {"stage": "classifier", "classes": len(classes)}, dict(net.named_buffers())
    net.train()
    given = (inputs_at, losses_of, context.runtime, [label], buffers)
    _, facts = Trainer(artefact, plan, optimizer, parameters, *given).fit()
    test = context.dataset.test.of(classes)
    predicted = torch.tensor(classes)[predict(net.eval(), test.pixels, device)]
    artefact.finish(dict(net.state_dict()) | {"predicted": predicted, "true": test.labels}, **facts)


def synthetic(context: Context, sources: dict[int, Source], samples: dict[int, Tensor]) -> tuple[Images, dict]:
    """(samples of several classes as one training set, what a classifier's key says of their origin)."""
    labels = torch.cat([torch.full((len(samples[cls]),), cls) for cls in sources])
    images = Images(torch.cat([samples[cls] for cls in sources]), labels)
    keys = {str(cls): sample_artefact(context, source, cls).key for cls, source in sources.items()}
    return images, {"samples": keys, "count": context.experiment.samples_per_class}


@torch.no_grad()
def predict(logits: Callable[[Tensor], Tensor], pixels: Tensor, device: torch.device, batch: int = 500) -> Tensor:
    """The likeliest output of each uint8 image (N, C, H, W) -> (N,), on the CPU; a network is in eval mode."""
    parts = [logits(to_floats(part.to(device))).argmax(1).cpu() for part in pixels.split(batch)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
