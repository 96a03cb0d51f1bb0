"""How likely a model finds held-out images, and which of them it finds most and least likely.

    python examples/evaluate.py runs/demo data/photos-64 likely.png --extractor inception-2015-12-05.pt

The picture's upper row: the eight images with the fewest bits per dimension; the lower row: those with the most.
"""

import argparse

import torch

from hflow_fast.data import ImageDataset
from hflow_fast.inference import save_png, studies
from hflow_fast.metrics import FeatureExtractor, default_cache, evaluation_indices, fid_of_model
from hflow_fast.training import likelihood_bounds, load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="a run's folder or a checkpoint file")
parser.add_argument("data", help="dataset made by hflow-fast dataset")
parser.add_argument("picture", help="PNG file to make")
parser.add_argument("--n", type=int, default=1000, help="held-out images, at most, and samples for the FID")
parser.add_argument("--extractor", help="TorchScript file for the FID; it is code that will be run")
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model, config = load_model(arguments.checkpoint, device=device)
dataset = ImageDataset.open(arguments.data)

indices = evaluation_indices(len(dataset.held_out), arguments.n)
bounds = likelihood_bounds(model, dataset.held_out, indices, batch_size=config["GENERAL"]["BATCH_SIZE"], draws=2)
total, levels = bounds.estimates()
print(f"{total.mean:.3f} ± {total.half_width:.3f} bits/dim on {len(indices)} images, "
      f"± {total.noise_half_width:.4f} of it from the noise")
for name, level in levels.items():
    print(f"  level {name}: {level.mean:.3f} ± {level.half_width:.3f} bits per dimension of its own")

values, order = bounds.total.mean(dim=0).sort()
count = min(8, len(order) // 2)
images = dataset.held_out[indices[torch.cat([order[:count], order[-count:]])]].unflatten(0, (2, count))
rows = [f"up to\n{values[count - 1]:.2f}", f"from\n{values[-count]:.2f}"]
save_png(studies.labelled_grid(images, rows=rows), arguments.picture)

if arguments.extractor:
    extractor = FeatureExtractor.load(arguments.extractor, device)
    fid = fid_of_model(model, dataset, extractor, n=arguments.n, std=0.8, cache=default_cache())
    print(f"FID {fid.value:.2f}", fid.caution or "")
