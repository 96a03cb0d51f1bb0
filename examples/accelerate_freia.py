"""A FrEIA network with fused layers: python examples/accelerate_freia.py"""

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock

import hflow_fast

model = SequenceINN(4, 16, 16)
for _ in range(8):
    model.append(AllInOneBlock, subnet_constructor=lambda c_in, c_out: torch.nn.Conv2d(c_in, c_out, 3, padding=1))
print(hflow_fast.accelerate(model))

latents, log_det = model(torch.rand(16, 4, 16, 16))
images, _ = model(latents, rev=True)
