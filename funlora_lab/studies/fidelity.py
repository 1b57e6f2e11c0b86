"""FID, KID, precision and recall as the literature computes them: torch-fidelity's extractor and its formulas.

torch-fidelity is optional. Its Inception weights are a file given by path, or fetched once from its own release page;
either way the file is first read without executing anything in it. Every table carries its protocol, since such
numbers depend on the extractor, the split, the number of images and how they were resized.
"""

import hashlib
import math
from importlib.metadata import version
from pathlib import Path
from urllib.error import URLError

import pandas as pd
import torch
from torch import Tensor, nn

from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun
from funlora_lab.studies import quality

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
EXTRACTOR = "inception-v3-compat"  # the 2015 network of the first FID, as torch-fidelity registers it
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # or all images, when there are fewer


def _torch_fidelity():
    try:
        import torch_fidelity
    except ImportError:
        raise LabError(
            "FID needs the package torch-fidelity, which is not installed: pip install 'funlora-lab[fid]'."
        ) from None
    return torch_fidelity


def cached_weights() -> Path:
    """Where torch keeps downloaded weights, and where a file fetched by hand is found."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]


def weights_file(path: str | Path | None = None) -> Path:
    """The file of Inception weights: the given one, else the cached one, else downloaded now.

    Raises LabError that says what to fetch and where to put it, or that the file is not one of weights.
    """
    cached = cached_weights()
    file = Path(path) if path else cached
    if path and not file.is_file():
        raise LabError(
            f"There are no Inception weights at {file}: fetch {URL} and give its path, or put it at {cached}."
        )
    if not file.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(cached), hash_prefix="6726825d", progress=False)
        except (URLError, OSError, RuntimeError) as reason:
            raise LabError(
                f"The Inception weights could not be downloaded ({reason}): "
                f"fetch {URL} elsewhere and give its path, or put it at {cached}."
            ) from None
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as reason:  # torch raises half a dozen kinds here
        raise LabError(
            f"{file} is not a file of plain weights ({type(reason).__name__}): "
            f"fetch {URL} and give its path, or put it at {cached}."
        ) from None
    return file


class Extractor:
    """An extractor registered with torch-fidelity, and the layer that it uses for FID."""

    def __init__(self, name: str, weights: Path | None, device: torch.device):
        _torch_fidelity()
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise LabError(f"Unknown extractor '{name}': accepted are {', '.join(FEATURE_EXTRACTORS_REGISTRY)}.")
        kind = FEATURE_EXTRACTORS_REGISTRY[name]
        self.name, self.weights, self.device = name, weights, device
        self.layer = kind.get_default_feature_layer_for_metric("fid")
        try:
            self.net: nn.Module = kind(name, [self.layer], feature_extractor_weights_path=str(weights)).to(device)
        except (RuntimeError, KeyError, TypeError) as reason:
            first = str(reason).split("\n")[0]
            raise LabError(f"{weights} does not fit the extractor {name} ({first}): fetch {URL}.") from None

    @torch.no_grad()
    def features(self, pixels: Tensor, batch: int = 64) -> Tensor:
        """uint8 images (N, C, H, W), grey ones repeated to three channels -> features (N, D) on the CPU."""
        rgb = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        return torch.cat([self.net(part.to(self.device))[0].cpu() for part in rgb.split(batch)])

    def protocol(self) -> dict[str, str]:
        digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()[:16]
        return {
            "extractor": f"{self.name}, layer {self.layer}",
            "weights": f"{self.weights.name}, sha256 {digest}",
            "software": f"torch-fidelity {version('torch-fidelity')}",
        }


def published_measures(real: Tensor, drawn: Tensor) -> dict[str, float]:
    """torch-fidelity's own FID, KID, precision and recall of its features (N, D) and (M, D)."""
    _torch_fidelity()
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    statistics = [metric_fid.fid_features_to_statistics(part.double()) for part in (drawn, real)]
    size = min(KID_SUBSET_SIZE, len(real), len(drawn))
    settings = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "verbose": False}
    kid = metric_kid.kid_features_to_metric(drawn.double(), real.double(), **settings)
    prc = metric_prc.prc_features_to_metric(drawn, real, prc_neighborhood=quality.NEIGHBOURS, verbose=False)
    return {
        "FID": metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
        "KID": kid["kernel_inception_distance_mean"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }


OURS = {"FID": "Frechet", "KID": "kernel", "precision": "precision", "recall": "recall"}
BOUNDS = {"FID": (0, math.inf), "KID": (-math.inf, math.inf), "precision": (0, 1), "recall": (0, 1)}


def inception_quality(
    opened: OpenRun,
    weights: str | Path | None = None,
    split: str = "train",
    count: int | None = None,
    draws: int = 20,
    extractor: str = EXTRACTOR,
) -> pd.DataFrame:
    """FID, KID, precision and recall for every group of classes, with intervals and the protocol in every line.

    ``count`` samples a class against all real images of ``split``. The value is torch-fidelity's; low and high are its
    distance to the middle 95 % of ``draws`` random halves (quality.halvings), by this package's equal formulas.
    """
    _torch_fidelity()
    real, drawn = quality.images_of(opened, split, count)
    extract = Extractor(extractor, weights_file(weights), opened.runtime.device)
    real, drawn = ({cls: extract.features(images) for cls, images in part.items()} for part in (real, drawn))
    rows = []
    for group, classes in quality.groups(opened).items():
        x, y = quality.joined(real, classes), quality.joined(drawn, classes)
        halves = [quality.measure(half.reference, half.drawn) for half in quality.halvings(x, y, draws, 0)]
        for name, value in published_measures(x, y).items():
            around = quality.spread([half[OURS[name]] for half in halves])
            least, most = BOUNDS[name]
            ends = {end: value + around[end] - around["value"] for end in ("low", "high")}
            ends = {end: min(max(bound, least), most) for end, bound in ends.items()}
            sizes = {"real images": len(x), "samples": len(y), "split": split}
            rows.append({"group": group, "measure": name, "value": value} | ends | sizes | extract.protocol())
    return pd.DataFrame(rows)
