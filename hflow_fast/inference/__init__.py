"""What a trained model is used for: samples, interpolations, attributes, latents on disk, reconstructions, pictures."""

from __future__ import annotations

from .attribute_files import load_attributes, save_attributes
from .identity import model_fingerprint
from .images import image_grid, save_png
from .inputs import ImageSet, open_images, read_image
from .interpolation import interpolate, latents_of, mix, there_and_back
from .latent_files import LatentFiles
from .latents import Encoded, RoundTrip, decode_to_folder, encode_to_file
from .manipulation import Attribute, AttributeMeans, attribute_of_images, attributes_of_dataset, manipulate
from .reconstruction import reconstruct
from .sampling import draw_latents, draw_samples, write_samples
from .video import check_video_path, save_video

__all__ = ["Attribute", "AttributeMeans", "Encoded", "ImageSet", "LatentFiles", "RoundTrip", "attribute_of_images",
           "attributes_of_dataset", "check_video_path", "decode_to_folder", "draw_latents", "draw_samples",
           "encode_to_file", "image_grid", "interpolate", "latents_of", "load_attributes", "manipulate", "mix",
           "model_fingerprint", "open_images", "read_image", "reconstruct", "save_attributes", "save_png", "save_video",
           "there_and_back", "write_samples"]
