"""What a trained model is used for: samples, interpolations, latents on disk, reconstructions, and pictures of them."""

from __future__ import annotations

from .identity import model_fingerprint
from .images import image_grid, save_png
from .inputs import ImageSet, open_images, read_image
from .interpolation import interpolate, latents_of, mix, there_and_back
from .latents import Encoded, LatentFiles, RoundTrip, decode_to_folder, encode_to_file
from .reconstruction import reconstruct
from .sampling import draw_latents, draw_samples, write_samples
from .video import check_video_path, save_video

__all__ = ["Encoded", "ImageSet", "LatentFiles", "RoundTrip", "check_video_path", "decode_to_folder", "draw_latents",
           "draw_samples", "encode_to_file", "image_grid", "interpolate", "latents_of", "mix", "model_fingerprint",
           "open_images", "read_image", "reconstruct", "save_png", "save_video", "there_and_back", "write_samples"]
