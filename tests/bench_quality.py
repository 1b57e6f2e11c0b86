"""How long precision and recall of many images take: python tests/bench_quality.py [IMAGES [FEATURES]].

Random features, as many real as drawn images; by default 20,000 of each with 512 features.
"""

import sys
import time

import torch

from funlora_lab.studies.quality import precision_recall

images, features = (int(word) for word in (sys.argv[1:] + ["20000", "512"][len(sys.argv) - 1 :]))
generator = torch.Generator().manual_seed(0)
real, drawn = (torch.randn(images, features, generator=generator) for _ in range(2))
begun = time.monotonic()
precision, recall = precision_recall(real, 0.95 * drawn)
print(f"{images:,} x {images:,} x {features}: {time.monotonic() - begun:.0f} s on {torch.get_num_threads()} threads")
print(f"precision {precision:.4f}, recall {recall:.4f}")
