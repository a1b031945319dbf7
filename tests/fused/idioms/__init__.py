"""Losses as people write them: what they do to a stack of layers on its way to the scan.

Each says which axis of a parameter has its layers, so that a test can apply an optimizer layer by
layer by hand, and which parameters the fused step must walk layer by layer.
"""

from . import axes, loops, no_layers, operations, several, stages, sums  # noqa: F401
from .registry import IDIOMS, NO_LAYERS, Sizes, layer_axes

__all__ = ["IDIOMS", "NO_LAYERS", "Sizes", "layer_axes"]
