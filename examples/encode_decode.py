"""Images to latents on disk, and back: all of them, and without what the finest level adds.

    python examples/encode_decode.py runs/demo photos/ latents.safetensors round_trip.png

The picture's rows: the first eight images; decoded from the file; decoded with the finest level's latents at zero.
"""

import argparse

import torch

from hflow_fast.data import to_uint8
from hflow_fast.inference import LatentFiles, encode_to_file, image_grid, open_images, save_png
from hflow_fast.training import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="a run's folder or a checkpoint file")
parser.add_argument("images", help="an image, a folder or zip of images, or a dataset")
parser.add_argument("latents", help="safetensors file to make")
parser.add_argument("picture", help="PNG file to make")
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model, _ = load_model(arguments.checkpoint, device=device)

done = encode_to_file(model, [arguments.images], arguments.latents, part="held-out", model_name=arguments.checkpoint)
exact = sum(image.exact for image in done.images)
print(f"{exact} of {len(done.images)} images come back bit for bit; "
      f"largest error {max(image.max_error for image in done.images):.2g} steps of 8 bits")

latents = [latent.to(device) for latent in next(LatentFiles(arguments.latents).batches(8))]
without_finest = [torch.zeros_like(latents[0]), *latents[1:]]
with torch.no_grad(), open_images([arguments.images], model.resolution, part="held-out") as images:
    _, originals = next(images.batches(range(8), 8))
    decoded = [to_uint8(model.decode(each)[0]).cpu() for each in (latents, without_finest)]
save_png(image_grid(torch.cat([originals, *decoded]), columns=len(originals)), arguments.picture)
