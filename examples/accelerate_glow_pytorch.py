"""A Glow of rosinality/glow-pytorch with fused layers, run where its model.py is: python accelerate_glow_pytorch.py"""

import torch
from model import Glow

import hflow_fast

model = Glow(3, n_flow=4, n_block=2)
model(torch.rand(16, 3, 16, 16))  # the first batch initialises the actnorms
print(hflow_fast.accelerate(model))

log_p, log_det, latents = model(torch.rand(16, 3, 16, 16))
(log_p + log_det).mean().neg().backward()
images = model.reverse(latents, reconstruct=True)
