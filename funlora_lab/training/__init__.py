"""The one training loop, the devices it runs on, and several processes that train together."""

from funlora_lab.training.device import (
    Inputs,
    arithmetic,
    autocast,
    computing,
    convolutions_in,
    dropout_from,
    pick_device,
    prepared,
    replays,
    rounded,
)
from funlora_lab.training.processes import BACKENDS, PATIENCE, Team, launched, own_device, team_of
from funlora_lab.training.runtime import Event, Report, Runtime, Watch, ignore
from funlora_lab.training.trainer import Plan, Trainer
