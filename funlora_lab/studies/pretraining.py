"""A base that is first trained on unlabelled pictures: the paper's supplement 6.4, with COCO, and a rehearsal of it."""

import io

import pandas as pd
import torch
from PIL import Image

from funlora_lab.experiment import Experiment
from funlora_lab.seeds import stream
from funlora_lab.store import home, make_folder, write_atomically
from funlora_lab.studies import published

CROPS, LEAST = 600, 32  # pictures of the rehearsal, and the shortest side of one in pixels
NOT_GIVEN = "not run: pretrain_root names no pictures"
PRETRAINED = "FunLoRA, COCO"  # the row's name in the supplement is lost; so are its accuracies


def coco(base: Experiment) -> dict[str, Experiment]:
    """Supplement 6.4: FunLoRA with and without the pictures of ``pretrain_root``, and with ten times the samples."""
    rows = {"FunLoRA": base.but(method="funlora", pretrain_root="", pretrain_images=0)}
    rows |= {PRETRAINED: base.but(method="funlora")} if base.pretrain_root else {}
    more = {f"{row}, 10x samples": e.but(samples_per_class=10 * e.samples_per_class) for row, e in rows.items()}
    return rows | more


def rehearsed(base: Experiment) -> Experiment:
    """The experiment with pictures to pre-train on: those it names, or, of digits, crops of two photographs.

    The photographs are scikit-learn's, a temple and a flower; they show that the training works, not what COCO gives.
    """
    if base.pretrain_root or base.data != "digits":
        return base
    from sklearn.datasets import load_sample_images

    folder, photographs = home() / "pictures" / "two-photographs", load_sample_images().images  # (H, W, 3)
    make_folder(folder)
    for i in range(CROPS):
        if (path := folder / f"{i:03d}.png").exists():
            continue
        pixels, generator = photographs[i % len(photographs)], stream(0, "crop", i)
        H, W, _ = pixels.shape
        side = int(torch.randint(LEAST, min(H, W) + 1, (), generator=generator))
        top, left = (int(torch.randint(0, n - side + 1, (), generator=generator)) for n in (H, W))
        file = io.BytesIO()
        Image.fromarray(pixels[top : top + side, left : left + side]).resize((LEAST, LEAST)).save(file, "PNG")
        write_atomically(path, file.getvalue())
    return base.but(pretrain_root=str(folder))


def table(ours: pd.DataFrame) -> pd.DataFrame:
    """The supplement's table beside ``ours`` (a row's name -> its scores as text); its accuracies are lost."""
    names = [PRETRAINED.partition(",")[0], PRETRAINED]
    names += [f"{name}, 10x samples" for name in names]
    shown = pd.DataFrame({"pre-trained": ["yes" if PRETRAINED in name else "no" for name in names]}, names)
    shown["published LA"], shown["published parameters"] = "lost", " / ".join(published.TOTALS.values())
    return shown.join(ours).astype(object).fillna(NOT_GIVEN)
