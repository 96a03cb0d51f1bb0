"""A flow of nflows with fused layers: python examples/accelerate_nflows.py"""

import torch
from nflows import transforms
from nflows.nn.nets import ConvResidualNet

import hflow_fast

coupling = transforms.AffineCouplingTransform([0, 0, 1, 1], lambda c_in, c_out: ConvResidualNet(c_in, c_out, 32))
model = transforms.CompositeTransform([transforms.ActNorm(4), transforms.OneByOneConvolution(4), coupling])
model(torch.rand(16, 4, 16, 16))  # the first batch initialises the actnorm
print(hflow_fast.accelerate(model))

latents, log_det = model(torch.rand(16, 4, 16, 16))
images, _ = model.inverse(latents)
