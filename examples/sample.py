"""The same samples at several standard deviations of the latents, as one picture.

    python examples/sample.py runs/demo samples.png

Each row has one std: smaller is cleaner, larger more varied. The last row keeps the coarse levels of the row above and
takes the finest level's mean.
"""

import argparse

import torch

from hflow_fast.data import to_uint8
from hflow_fast.inference import draw_latents, draw_samples, image_grid, save_png
from hflow_fast.training import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="a run's folder or a checkpoint file")
parser.add_argument("out", help="PNG file to make")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model, _ = load_model(arguments.checkpoint, device=device)

stds = [0.3, 0.5, 0.7, 0.9]
rows = [draw_samples(model, 8, std=std, seed=arguments.seed) for std in stds]  # (8, 3, R, R), uint8

latents = draw_latents(model, range(8), std=stds[-1], seed=arguments.seed)  # finest level first
latents[0].zero_()
with torch.no_grad():
    rows.append(to_uint8(model.decode(latents)[0]).cpu())
save_png(image_grid(torch.cat(rows), columns=8), arguments.out)
