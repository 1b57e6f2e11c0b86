"""FID, KID, precision and recall as the literature computes them: torch-fidelity's extractor and its formulas.

torch-fidelity is optional. Its Inception weights are a file given by path, or fetched once from its release page, and
first read without executing anything. Such numbers depend on their protocol, which every table carries.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from funlora_lab.continual import OpenRun
from funlora_lab.errors import LabError
from funlora_lab.experiment import place
from funlora_lab.store import Run
from funlora_lab.studies import quality
from funlora_lab.studies.sweeps import NOT_RUN

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
EXTRACTOR = "inception-v3-compat"  # the 2015 network of the first FID, as torch-fidelity registers it
KID_SUBSET_SIZE = 1000  # of the 100 subsets of torch-fidelity; or all images, when there are fewer
MEASURES = {  # measure -> its name in torch-fidelity and in quality.py, the range of its values
    "FID": ("frechet_inception_distance", "Frechet", 0, math.inf),
    "KID": ("kernel_inception_distance_mean", "kernel", -math.inf, math.inf),
    "precision": ("precision", "precision", 0, 1),
    "recall": ("recall", "recall", 0, 1),
}


def _torch_fidelity():
    try:
        import torch_fidelity
        from torch_fidelity import metric_fid, metric_kid, metric_prc, registry  # noqa: F401
    except ImportError:
        raise LabError("FID needs the package torch-fidelity: pip install 'funlora-lab[fid]'.") from None
    return torch_fidelity


def weights_file(path: str | Path | None = None) -> Path:
    """The file of Inception weights: the given one, else the one in torch's cache, downloaded there when missing."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    file, advice = place(path or cached), f"fetch {URL} and give its path, or put it at {cached}."
    if not file.is_file():
        if path:
            raise LabError(f"There are no Inception weights at {file}: {advice}")
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(cached), hash_prefix="6726825d", progress=False)
        except (OSError, RuntimeError) as reason:
            raise LabError(f"The Inception weights could not be downloaded ({reason}): {advice}") from None
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as reason:  # torch raises half a dozen kinds here
        raise LabError(f"{file} is not a file of plain weights ({type(reason).__name__}): {advice}") from None
    return file


def extractor(name: str, weights: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """(uint8 images (N, C, H, W) -> features (N, D) of its FID layer, protocol) of one that torch-fidelity knows."""
    known = _torch_fidelity().registry.FEATURE_EXTRACTORS_REGISTRY
    if name not in known:
        raise LabError(f"Unknown extractor '{name}': accepted are {', '.join(known)}.")
    layer = known[name].get_default_feature_layer_for_metric("fid")
    try:
        net = known[name](name, [layer], feature_extractor_weights_path=str(weights)).to(device)
    except (RuntimeError, KeyError, TypeError) as reason:
        first = str(reason).split("\n")[0]
        raise LabError(f"{weights} does not fit the extractor {name} ({first}): fetch {URL}.") from None

    @torch.no_grad()
    def features(pixels: Tensor, batch: int = 64) -> Tensor:
        return torch.cat([net(part.to(device))[0].cpu() for part in pixels.expand(-1, 3, -1, -1).split(batch)])

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    protocol = {"extractor": f"{name}, layer {layer}", "weights": f"{weights.name}, sha256 {digest}"}
    return features, protocol | {"software": f"torch-fidelity {version('torch-fidelity')}"}


def published_measures(real: Tensor, drawn: Tensor) -> dict[str, float]:
    """torch-fidelity's own FID and KID of its features (N, D) and (M, D), with precision and recall.

    The last two are quality.py's: the same numbers, in minutes where torch-fidelity takes days.
    """
    theirs, size = _torch_fidelity(), min(KID_SUBSET_SIZE, len(real), len(drawn))
    x, y = (part.double().cpu() for part in (drawn, real))
    statistics = [theirs.metric_fid.fid_features_to_statistics(part) for part in (x, y)]
    found = theirs.metric_fid.fid_statistics_to_metric(*statistics, False)
    found |= theirs.metric_kid.kid_features_to_metric(x, y, kid_subset_size=size, verbose=False)
    found |= dict(zip(("precision", "recall"), quality.precision_recall(real, drawn), strict=True))
    return {measure: found[name] for measure, (name, *_) in MEASURES.items()}


def inception_quality(run: OpenRun, weights=None, split="train", count: int | None = None, draws=20, name=EXTRACTOR):
    """FID, KID, precision and recall for every group of classes, with intervals and the protocol in every line.

    ``count`` samples a class against all real images of ``split``, by the registered extractor ``name``. The value is
    torch-fidelity's; low and high come from ``draws`` halvings (quality.py), by this package's equal formulas.
    """
    _torch_fidelity()
    features, protocol = extractor(name, weights_file(weights), run.runtime.device)

    def make() -> pd.DataFrame:
        rows = []
        for group, x, y in quality.by_group(run, features, split, count):
            pairs = quality.halvings(x, y, draws, 0, quality.telling(run, group))
            halves = [quality.measure(half, picked) for half, _, picked in pairs]
            about = {"real images": len(x), "samples": len(y), "split": split} | protocol
            for measure, value in published_measures(x, y).items():
                _, ours, least, most = MEASURES[measure]
                around = quality.interval([half[ours] for half in halves])
                ends = {end: min(max(value + around[end] - around["value"], least), most) for end in ("low", "high")}
                rows.append({"group": group, "measure": measure, "value": value} | ends | about)
        return pd.DataFrame(rows)

    return quality.stored(run, protocol | {"split": split, "count": count, "draws": draws}, make)


def known(runs: Sequence[Run], name: str = EXTRACTOR) -> dict[str, str]:
    """What ``inception_quality`` left in the folders of some runs: measure -> its mean over them, or "not run".

    Of all classes, against all training images, by the extractor ``name``.
    """
    tables = [pd.DataFrame(lines) for run in runs for lines in quality.kept(run.folder).values()]
    judged = [table for table in tables if "extractor" in table and table["extractor"][0].startswith(f"{name},")]
    found = dict.fromkeys(MEASURES, NOT_RUN)
    if judged:
        of_all = pd.concat(judged).query("group == 'all' and split == 'train'")
        found |= {measure: f"{value:.2f}" for measure, value in of_all.groupby("measure")["value"].mean().items()}
    return found
