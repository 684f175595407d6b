"""The primitives of the codecs in numpy: the readable reference for ``csrc/compression``.

Same names, arguments and bits as the native functions; FORMAT.md beside this folder decides.
It also is the way without a compiler: correct everywhere, and slow in the entropy coder, which
walks point by point. Arrays go in and out flat, in C order; a shape has 1 to 4 axes. The
calling thread must not flush denormal numbers to zero; the codec sees to that.
"""

from lowtide.compression.reference.bounds import exp2, outside
from lowtide.compression.reference.differences import difference_decode, difference_encode
from lowtide.compression.reference.entropy_decoder import entropy_decode
from lowtide.compression.reference.entropy_encoder import cost_bits, entropy_encode
from lowtide.compression.reference.interpolation import interpolation_decode, interpolation_encode
from lowtide.compression.reference.mixed import mixed_decode
from lowtide.compression.reference.network import network_levels, network_run

__all__ = [
    "cost_bits",
    "difference_decode",
    "difference_encode",
    "entropy_decode",
    "entropy_encode",
    "exp2",
    "interpolation_decode",
    "interpolation_encode",
    "mixed_decode",
    "network_levels",
    "network_run",
    "outside",
]
