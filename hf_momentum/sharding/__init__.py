"""Who owns which piece of which parameter. A single process, where every tensor is whole, is the simplest case."""

from hf_momentum.sharding.layout import SUPPORTED, UnsupportedLayoutError, require_whole_tensor

__all__ = ["SUPPORTED", "UnsupportedLayoutError", "require_whole_tensor"]
