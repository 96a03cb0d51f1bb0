"""An attribute found from labelled images, added to others and taken away, as one picture.

    python examples/manipulate.py runs/faces smiling/ serious/ photos/ smile.png

Each row is an image, unchanged in the middle.
"""

import argparse

import torch

from hflow_fast.inference import attribute_of_images, manipulate, open_images, save_png, studies
from hflow_fast.training import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="a run's folder or a checkpoint file")
parser.add_argument("positive", help="images that have the attribute: a folder or zip")
parser.add_argument("negative", help="images that do not")
parser.add_argument("images", help="images to change")
parser.add_argument("picture", help="PNG file to make")
arguments = parser.parse_args()

model, _ = load_model(arguments.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
strengths = [-1.0, -0.5, 0.0, 0.5, 1.0]
with (open_images([arguments.positive], model.resolution) as positive,
      open_images([arguments.negative], model.resolution) as negative,
      open_images([arguments.images], model.resolution) as images):
    attribute = attribute_of_images(model, positive, negative)
    _, chosen = next(images.batches(range(min(4, len(images))), 4))
changed = manipulate(model, chosen, attribute, strengths)  # (strengths, images, 3, R, R), uint8
save_png(studies.labelled_grid(changed.transpose(0, 1), columns=[f"{value:+g}" for value in strengths]),
         arguments.picture)
