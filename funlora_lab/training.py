"""The one training loop: base, adapters side by side and classifiers all run through ``fit``.

It is resumable at any step with bit-identical results, because everything random is a function of the step number
(streams.py) and everything else (weights, moving average, optimiser state, losses not yet logged) is in the state.

Letters: L lanes, the independent problems trained side by side (K classes; 1 for a whole network or classifier).
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from funlora_lab import speed
from funlora_lab.distributed import Team
from funlora_lab.errors import Damaged, LabError, Stopped
from funlora_lab.store import Stage

Event = dict


def _save_seconds() -> float:
    """FUNLORA_SAVE_SECONDS, or 20."""
    word = os.environ.get("FUNLORA_SAVE_SECONDS") or "20"
    try:
        seconds = float(word)
        assert seconds >= 0
    except (ValueError, AssertionError):
        raise LabError(f"FUNLORA_SAVE_SECONDS={word}: accepted is a number of seconds from 0 up.") from None
    return seconds


@dataclass
class Runtime:
    """Where and how patiently work is done; nothing here changes a result beyond the device's own rounding.

    ``stop`` is asked before every step: a sentence means stop here, saved. ``save_seconds`` is the least time between
    two saves of progress (saving also never takes more than about a twentieth of the time); 0 saves every step.
    ``tell`` is given a sentence when something outside holds the work up. ``team`` are the processes that train a whole
    network together. ``compile``: auto, off, on or graphs; see ``speed.prepared``.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stop: Callable[[], str | None] = lambda: None
    save_seconds: float = field(default_factory=_save_seconds)
    team: Team = field(default_factory=Team)
    tell: Callable[[str], None] = lambda sentence: None
    compile: str = "auto"

    def prepared(self, network: nn.Module) -> nn.Module:
        """The network on the device, in its layout there, compiled where that is asked for."""
        return speed.prepared(network, self.device, self.compile)

    def laid_out(self, network: nn.Module) -> nn.Module:
        """The network on the device, in its layout there."""
        return speed.laid_out(network, self.device)

    def check(self) -> None:
        """Raise Stopped when a stop was asked for; between stages everything is already saved."""
        if reason := self.stop():
            raise Stopped(reason)


@contextmanager
def memory_for(settings: str):
    """Say which settings to lower when the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as reason:
        spent = isinstance(reason, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(reason)
        if not spent:
            raise
        raise LabError(f"Out of memory: lower {settings}; everything saved before is untouched.") from None


MEMORY = {"adapter": "lanes or adapter_batch", "classifier": "classifier_batch"}  # else base_batch


@dataclass(frozen=True)
class Plan:
    """How long and at what rate: ``steps``, peak ``rate``, its ``shape`` (constant, cosine, one-cycle), averaging.

    ``warmup`` and ``ema_start`` are in steps; ``ema`` is the decay of the moving average, 0 for none.
    """

    steps: int
    batch: int
    rate: float
    shape: str = "constant"
    warmup: int = 0
    ema: float = 0.0
    ema_start: int = 0
    log_every: int = 50

    def rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        if self.shape == "one-cycle":  # Smith & Topin: up over the first 30 % from 1/25 of the peak, down to almost 0
            up = 0.3 * self.steps
            low, high = self.rate / 25, self.rate
            if step < up:
                return low + (high - low) * (1 - math.cos(math.pi * step / up)) / 2
            return high * (1 + math.cos(math.pi * (step - up) / (self.steps - up))) / 2
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.shape == "cosine":
            return self.rate * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2
        return self.rate

    def ema_decay(self, step: int) -> float:
        """min(decay, (1 + n) / (10 + n)) after n updates: without this warm-up a short run averages its start."""
        n = step - self.ema_start
        return min(self.ema, (1 + n) / (10 + n))


def _named_state(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"optimizer/{key}/{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def _restore(saved: dict[str, Tensor], groups: dict[str, dict[str, Tensor]], optimizer, parameters) -> Tensor:
    """Copy a saved state back in place; returns the losses that were not yet logged (steps, L)."""
    with torch.no_grad():
        for prefix, tensors in groups.items():
            for name, tensor in tensors.items():
                tensor.copy_(saved[f"{prefix}/{name}"])
    for name, value in saved.items():
        prefix, _, rest = name.partition("/")
        if prefix == "optimizer":
            key, _, parameter = rest.partition("/")
            target = parameters[parameter]
            stays = key == "step" and not optimizer.defaults.get("fused")
            optimizer.state[target][key] = value.clone() if stays else value.to(target.device)
    return saved["losses"]


def fit(
    stage: Stage,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Tensor],
    loss_at: Callable[[int], Tensor],
    runtime: Runtime,
    labels: list[dict],
    buffers: dict[str, Tensor] | None = None,
    clip: float = 0.0,
) -> Iterator[Event]:
    """Train ``parameters`` in place from wherever ``stage`` stands, yielding a ``loss`` event per lane and interval.

    loss_at(step) -> (L,); the lanes' losses are summed, so no lane's gradient sees another. ``labels`` names the
    lanes in the events. Returns (final or averaged parameters, facts). Raises LabError when a loss is not finite
    (the state saved before it stays), Stopped when the runtime asks for it.
    """
    buffers = buffers or {}
    average = {name: value.detach().clone() for name, value in parameters.items()} if plan.ema else {}
    groups = {"weight": parameters, "average": average, "buffer": buffers}
    pending: list[Tensor] = []
    first, earlier = 0, 0.0
    if saved := stage.resume():
        tensors, facts = saved
        try:
            pending = list(_restore(tensors, groups, optimizer, parameters).to(runtime.device))
        except (KeyError, RuntimeError):
            raise Damaged(stage.state_file, f"{stage.state_file} is of another version of the program") from None
        first, earlier = facts["step"], facts["seconds"]
        for event in stage.events():  # a run's log begins anew when it resumes: it needs the earlier lines too
            yield {**event, "replayed": True}
    begun = last_save = time.monotonic()
    save_cost = 0.0

    def elapsed() -> float:
        return earlier + time.monotonic() - begun

    def checked(step: int) -> Tensor:
        losses = torch.stack(pending).cpu() if pending else torch.empty(0, len(labels))
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            when, lane = bad[0].tolist()
            raise LabError(
                f"The loss of {' '.join(f'{k} {v}' for k, v in labels[lane].items())} was not finite at step "
                f"{step - len(losses) + when + 1}; the state saved before it is kept, a lower learning rate may help."
            )
        return losses

    def check_weights(step: int) -> None:
        if not torch.stack(torch._foreach_norm(list(parameters.values()))).isfinite().all():
            raise LabError(
                f"The weights of the {labels[0]['stage']} were not finite after step {step}; "
                "the state saved before it is kept, a lower learning rate may help."
            )

    def save(step: int) -> None:
        nonlocal last_save, save_cost
        before = time.monotonic()
        losses = checked(step)  # first: it knows the step at which it went wrong
        check_weights(step)
        tensors = {f"{prefix}/{name}": v for prefix, group in groups.items() for name, v in group.items()}
        tensors |= _named_state(optimizer, parameters) | {"losses": losses}
        stage.save_state(tensors, step=step, seconds=elapsed())
        last_save = time.monotonic()
        save_cost = last_save - before

    for step in range(first, plan.steps):
        if reason := runtime.team.ask(runtime.stop, step):
            save(step)
            raise Stopped(reason)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step)
        with memory_for(MEMORY.get(labels[0]["stage"], "base_batch")):
            optimizer.zero_grad(set_to_none=True)
            losses = loss_at(step)
            losses.sum().backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(list(parameters.values()), clip)
            optimizer.step()
        if average and step >= plan.ema_start:
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - plan.ema_decay(step))
        pending.append(losses.detach())
        done = step + 1
        if done % plan.log_every == 0 or done == plan.steps:
            for label, loss in zip(labels, checked(done).mean(0).tolist(), strict=True):
                yield stage.log(
                    {
                        "event": "loss",
                        **label,
                        "step": done,
                        "steps": plan.steps,
                        "images": done * plan.batch,
                        "loss": loss,
                        "seconds": round(elapsed(), 3),
                    }
                )
            pending = []
        rest = max(runtime.save_seconds, 20 * save_cost) if runtime.save_seconds else 0
        if done < plan.steps and time.monotonic() - last_save >= rest:
            save(done)
    check_weights(plan.steps)
    averaged = average if average and plan.ema_start < plan.steps else parameters
    return {name: value.detach() for name, value in averaged.items()}, {"seconds": elapsed(), "steps": plan.steps}
