"""The studies of a model's latent hierarchy, as pictures in a folder.

    python examples/studies.py runs/demo photos/ studies/ --pick 3,20,60,100

Heat maps of what each level changes; latents silenced from either end of the hierarchy; latents held on either side of
a cut; the same seeds at several stds; and a walk through latent space that ends where it began.
"""

import argparse
from pathlib import Path

import torch

from hflow_fast.inference import image_grid, open_images, save_png, save_video, studies
from hflow_fast.training import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="a run's folder or a checkpoint file")
parser.add_argument("images", help="an image, a folder or zip of images, or a dataset")
parser.add_argument("out", type=Path, help="folder for the pictures")
parser.add_argument("--pick", default="0", help="which of the images, counted from 0")
parser.add_argument("--std", type=float, default=0.6, help="of the latents that are drawn anew")
parser.add_argument("--draws", type=int, default=32, help="samples behind each heat map")
parser.add_argument("--frames", type=int, default=24, help="of the walk")
arguments = parser.parse_args()

model, _ = load_model(arguments.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
with open_images([arguments.images], model.resolution, part="held-out") as found:
    pick = list(map(int, arguments.pick.split(",")))
    images = torch.cat([batch for position in pick for _, batch in found.batches(range(position, position + 1), 1)])
arguments.out.mkdir(parents=True, exist_ok=True)
names = studies.level_names(model)  # finest first, the code last

maps = studies.randomize_levels(model, images, draws=arguments.draws)
studies.save_heat_maps(images, maps, names, arguments.out / "study_randomize.png",
                       label="standard deviation; black to white is 1")

for start, order in (("finest", names), ("coarsest", names[::-1])):
    steps = studies.zero_levels(model, images, start=start)  # (steps, images, 3, R, R)
    columns = ["all\nlatents", *(f"… without\n{name}" for name in order)]
    save_png(studies.labelled_grid(steps.transpose(0, 1), columns=columns), arguments.out / f"study_zero_{start}.png")

for keep in ("coarse", "fine"):
    samples = studies.hold_levels(model, images[:1], keep=keep, std=arguments.std)[0]  # (cuts, samples, 3, R, R)
    cuts = range(1, len(names))
    held = [names[cut:] if keep == "coarse" else names[:cut] for cut in cuts]
    pictures = torch.cat([images[:1].expand(len(cuts), 1, -1, -1, -1), samples], dim=1)
    grid = studies.labelled_grid(pictures, rows=["held:\n" + ", ".join(levels) for levels in held],
                                 columns=["image", *[f"sample {number + 1}" for number in range(samples.shape[1])]])
    save_png(grid, arguments.out / f"study_hold_{keep}.png")

stds = [0.3, 0.5, 0.7, 1.0]
samples = studies.seed_samples(model, range(6), stds)
grid = studies.labelled_grid(samples, rows=[f"std {std}" for std in stds],
                             columns=[f"seed {seed}" for seed in range(6)])
save_png(grid, arguments.out / "study_seeds.png")

frames = studies.random_walk(model, frames=arguments.frames, count=2, std=0.5)
save_video((image_grid(pair, columns=2) for pair in frames), arguments.out / "study_walk.gif", fps=12)
