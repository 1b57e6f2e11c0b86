"""The systems that learn classes one task after another, behind one interface.

To add one, write a ``Generator`` and register it by ``@system(name, about)``, here or in a user's file.
"""

from funlora_lab.adapters import METHODS
from funlora_lab.systems.adapted import AdaptedBase
from funlora_lab.systems.baselines import FineTune, GenerativeMultitask, RealData, SelfReplay
from funlora_lab.systems.classifier import augment, build_classifier
from funlora_lab.systems.ddgr import Ddgr
from funlora_lab.systems.denoiser import DiffusionReplay, Guide
from funlora_lab.systems.generator import SYSTEMS, Batch, Context, Generator, Source, all_methods, check_method, system
from funlora_lab.systems.jdcl import Jdcl
from funlora_lab.systems.network import WholeNetwork, build_unet, meta_unet, noisy_batch, unet_settings
from funlora_lab.systems.sampling import draw, draw_chunk, sample_artefact, solver_of
from funlora_lab.systems.stable import StableDiffusion


def generator_of(context: Context) -> Generator:
    """The generator of the experiment's method; raises LabError for a method nobody registered."""
    method = context.experiment.method
    check_method(method)
    return AdaptedBase(context) if method in METHODS else SYSTEMS[method](context)
