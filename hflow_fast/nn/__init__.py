"""Flow layers. Each maps data to latent, ``z, log_det = layer(x, context=None)``, and back with ``layer.inverse``.

Log-dets are (B,), of the direction evaluated, in nats.
"""

from ..ops import CouplingSpec
from ._data_init import initialize_locally
from .actnorm import ActNorm
from .container import FlowStep, Sequential
from .coupling import AffineCoupling
from .invconv import InvConv1x1
from .recompute import set_recompute
from .reshape import Haar, Squeeze
from .reversible import Reversible

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "CouplingSpec",
    "FlowStep",
    "Haar",
    "InvConv1x1",
    "Reversible",
    "Sequential",
    "Squeeze",
    "initialize_locally",
    "set_recompute",
]
