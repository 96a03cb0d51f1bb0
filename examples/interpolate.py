"""From one image to another, in three ways: one strip of frames each in a picture, and the last of them as a film.

    python examples/interpolate.py runs/demo first.png second.png ways.png way.gif

The rows: straight through all latents; at constant distance from zero; and, of an HFlow, straight through the
endblock's code.
"""

import argparse

import torch

from hflow_fast.inference import image_grid, interpolate, latents_of, read_image, save_png, save_video, there_and_back
from hflow_fast.training import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="a run's folder or a checkpoint file")
parser.add_argument("first", help="an image of any common format")
parser.add_argument("second", help="another one")
parser.add_argument("strips", help="PNG file to make")
parser.add_argument("film", help="MP4 or GIF file to make")
parser.add_argument("--frames", type=int, default=16, help="of the film, one way")
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model, _ = load_model(arguments.checkpoint, device=device)

start, end = (latents_of(model, read_image(path, model.resolution)[None])
              for path in (arguments.first, arguments.second))
ways = [("lerp", "z"), ("slerp", "z")]
if hasattr(model, "endblock"):
    ways.append(("lerp", "y"))
strips = [torch.cat(list(interpolate(model, start, end, 8, mode=mode, space=space))) for mode, space in ways]
save_png(image_grid(torch.cat(strips), columns=8), arguments.strips)

frames = (image for image, in interpolate(model, start, end, arguments.frames, space=ways[-1][1]))
save_video(there_and_back(frames), arguments.film, fps=12, width=128)
