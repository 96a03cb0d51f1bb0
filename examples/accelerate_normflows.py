"""A Glow of normflows with fused layers: python examples/accelerate_normflows.py"""

import normflows
import torch

import hflow_fast

flows = [[*(normflows.flows.GlowBlock(12, 64) for _ in range(4)), normflows.flows.Squeeze()]]
model = normflows.MultiscaleFlow([normflows.distributions.DiagGaussian((12, 8, 8))], flows, [], class_cond=False)
model.forward_kld(torch.rand(16, 3, 16, 16))  # the first batch initialises the actnorms
print(hflow_fast.accelerate(model))

model.forward_kld(torch.rand(16, 3, 16, 16)).backward()
images, log_prob = model.sample(16)
