"""The one training loop: base, adapters side by side and classifiers all run through ``Trainer``.

It resumes at any step with bit-identical results: what is random is a function of the step, all else is in the state.
Letters: L lanes, the independent problems trained side by side (K classes; 1 for a whole network or classifier).
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import mean

import torch
from torch import Tensor

from funlora_lab.errors import Damaged, LabError, Stopped, memory_for
from funlora_lab.store import Artefact
from funlora_lab.training.device import Inputs, Steps, move, update
from funlora_lab.training.runtime import Runtime, ignore

MEMORY = {"adapter": "lanes or adapter_batch"} | dict.fromkeys(("classifier", "own classifier"), "classifier_batch")
LOOKS = 6  # about so many times a training that is watched is looked at
KEPT = "the state saved before it is kept, a lower learning rate may help."


@dataclass(frozen=True)
class Plan:
    """How long a training lasts and at what rate; all lengths are in steps."""

    steps: int
    batch: int
    rate: float  # the peak
    shape: str = "constant"  # constant, cosine, linear or one-cycle
    warmup: int = 0
    ema: float = 0.0  # decay of the moving average, 0 for none
    ema_start: int = 0
    log_every: int = 50

    @classmethod
    def of(cls, training, rate: float, steps: int, log_every: int) -> "Plan":
        """The plan of a group of an experiment's settings (``base``, ``adapter``) for so many steps."""
        warmup, ema_start = training.warmup // training.batch, training.ema_start // training.batch
        return cls(steps, training.batch, rate, training.schedule, warmup, training.ema, ema_start, log_every)

    def rate_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        if self.shape == "one-cycle":  # Smith & Topin: up over the first 30 % from 1/25 of the peak, down to almost 0
            up, low, high = 0.3 * self.steps, self.rate / 25, self.rate
            if step < up:
                return low + (high - low) * (1 - math.cos(math.pi * step / up)) / 2
            return high * (1 + math.cos(math.pi * (step - up) / (self.steps - up))) / 2
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.shape == "linear":  # down to 0
            return self.rate * (1 - step / self.steps)
        if self.shape == "cosine":
            return self.rate * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2
        return self.rate


@dataclass(eq=False)
class Trainer:
    """Trains from wherever the artefact stands, ``fit`` to the end or ``step`` by step; Damaged if it cannot resume."""

    artefact: Artefact
    plan: Plan
    optimizer: torch.optim.Optimizer
    parameters: dict[str, Tensor]  # trained in place
    inputs_at: Callable[[int], Inputs]  # step -> all that its losses depend on beside the parameters
    # -> (L,), summed: no lane's gradient sees another. A GPU repeats what this did in an early step on new inputs
    losses_of: Callable[[Inputs], Tensor]
    runtime: Runtime
    labels: list[dict]  # what names each lane in its ``loss`` events
    buffers: dict[str, Tensor] = field(default_factory=dict)  # saved with the parameters
    clip: float = 0.0  # the largest gradient norm, 0 for no limit
    before: Callable[[int], None] = ignore  # is given each step before it is taken: outside of what a GPU repeats
    draw: Callable[[dict[str, Tensor]], Tensor] | None = None  # images of a generator with such parameters, to watch

    def __post_init__(self):
        averaging = self.plan.ema and self.plan.ema_start < self.plan.steps
        self.average = {name: v.detach().clone() for name, v in self.parameters.items()} if averaging else {}
        groups = {"weight": self.parameters, "average": self.average, "buffer": self.buffers}
        self.tensors = {f"{prefix}/{name}": v for prefix, group in groups.items() for name, v in group.items()}
        self.losses = torch.zeros(self.plan.log_every, len(self.labels), device=self.runtime.device)  # of steps
        self.unlogged = 0  # so many of them
        runtime = self.runtime
        self.steps = Steps(self.advance, self._inputs_at, self.plan.steps, runtime.device, runtime.team.size == 1)
        self.done, self.earlier = 0, 0.0
        if saved := runtime.team.agree(self.artefact.resume()):
            self._restore(*saved)
        self.begun = time.monotonic()
        self.save_at = self.begun + self.runtime.save_seconds

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.begun

    def _restore(self, saved: dict[str, Tensor], facts: dict) -> None:
        try:
            for name, tensor in self.tensors.items():
                tensor.detach().copy_(saved[name])
            for name in [name for name in saved if name.startswith("optimizer/")]:
                _, key, parameter = name.split("/", 2)
                value, target = saved[name], self.parameters[parameter]
                if value.shape == target.shape and key != "step":  # in the parameter's own memory layout
                    value = torch.empty_like(target).copy_(value)
                elif key != "step" or self.optimizer.defaults.get("fused"):
                    value = value.to(target.device)
                self.optimizer.state[target][key] = value
            self.unlogged = len(saved["losses"])
            self.losses[: self.unlogged] = saved["losses"].to(self.runtime.device)
        except (KeyError, RuntimeError):
            path = self.artefact.state_file
            raise Damaged(path, f"{path} is of another version of the program") from None
        self.done, self.earlier = facts["step"], facts["seconds"]
        for event in self.artefact.events():  # a run's log begins anew when it resumes: it needs the earlier lines too
            self.runtime.report({**event, "replayed": True})

    def _losses(self) -> Tensor:
        """The losses (steps, L) not yet logged; raises LabError when one of them or a weight is not finite."""
        losses = self.losses[: self.unlogged].cpu()
        for when, lane in (~torch.isfinite(losses)).nonzero().tolist():
            name, step = " ".join(f"{k} {v}" for k, v in self.labels[lane].items()), self.done - len(losses) + when + 1
            raise LabError(f"The loss of {name} was not finite at step {step}; {KEPT}")
        if not torch.stack(torch._foreach_norm(list(self.parameters.values()))).isfinite().all():
            stage = self.labels[0]["stage"]
            raise LabError(f"The weights of the {stage} were not finite after step {self.done}; {KEPT}")
        return losses

    def save(self) -> None:
        before = time.monotonic()
        tensors = self.tensors | {"losses": self._losses()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter].items()
            tensors |= {f"optimizer/{key}/{name}": value for key, value in state if isinstance(value, Tensor)}
        self.artefact.save_state(tensors, step=self.done, seconds=self.seconds)
        now, least = time.monotonic(), self.runtime.save_seconds
        self.save_at = now + (max(least, 20 * (now - before)) if least else 0)  # at most about 5 % of the time

    def step(self) -> None:
        """One step, with its log lines and its save of progress when they are due."""
        plan = self.plan
        with memory_for(MEMORY.get(self.labels[0]["stage"], "base_batch")):
            self.before(self.done)
            self.steps(self.done)
        self.done += 1
        self.unlogged += 1
        if self.done % plan.log_every == 0 or self.done == plan.steps:
            self._log()
        if self.done < plan.steps and time.monotonic() >= self.save_at:
            self.save()

    def _inputs_at(self, step: int) -> Inputs:
        plan, n = self.plan, step - self.plan.ema_start
        # the average's step to the weights: a decay of (1 + n) / (10 + n) at first, else a short run averages its start
        share = 1 - min(plan.ema, (1 + n) / (10 + n)) if n >= 0 else 0.0
        rate, share = torch.tensor([plan.rate_at(step), share], dtype=torch.float64)
        return self.inputs_at(step) | {"rate": rate, "share": share, "slot": torch.tensor([step % plan.log_every])}

    def advance(self, inputs: Inputs) -> None:
        """The part of a step that depends on its inputs alone: on a GPU one graph."""
        values = list(self.parameters.values())
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses_of(inputs)
        losses.sum().backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(values, self.clip)
        update(self.optimizer, inputs["rate"])
        if self.average:
            move(list(self.average.values()), [value.detach() for value in values], inputs["share"])
        self.losses.index_copy_(0, inputs["slot"], losses.detach()[None])

    def _log(self) -> None:
        losses, plan = self._losses().mean(0).tolist(), self.plan
        facts = {"step": self.done, "steps": plan.steps, "images": self.done * plan.batch}
        for label, loss in zip(self.labels, losses, strict=True):
            event = {"event": "loss", **label, **facts, "loss": loss, "seconds": round(self.seconds, 3)}
            self.runtime.report(self.artefact.log(event))
        self.unlogged = 0
        every, seen = max(1, plan.steps // LOOKS), self.done - 1
        due = self.done == plan.steps or seen // every > (seen - plan.log_every) // every
        if self.runtime.watch and self.draw and due:
            of = {"stage": self.labels[0]["stage"], "classes": [own["class"] for own in self.labels if "class" in own]}
            with suppress(LabError):  # a generator that is far from its end may draw nothing finite
                self.runtime.watch(of | facts | {"loss": mean(losses)}, self.draw(self.average or self.parameters))

    def fit(self) -> tuple[dict[str, Tensor], dict]:
        """Train to the end -> (final or averaged parameters, facts); raises Stopped when the runtime asks for it."""
        while self.done < self.plan.steps:
            self.step()
            if self.done < self.plan.steps and (reason := self.runtime.team.ask(self.runtime.stop, self.done)):
                self.save()
                raise Stopped(reason)
        result = {name: value.detach() for name, value in (self.average or self.parameters).items()}
        return result, {"seconds": self.seconds, "steps": self.plan.steps}

    def finish(self, result: dict[str, Tensor] | None = None, **more) -> None:
        """``fit``, and keep what it gives, or other tensors that were trained in place, as the artefact's result."""
        weights, facts = self.fit()
        self.artefact.finish(result or weights, **facts, **more)
