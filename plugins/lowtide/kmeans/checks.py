"""What the native checks compute, in numpy, and the calibrated numbers they use."""

from __future__ import annotations

KAPPA_SUMS = 4.0


def kappa_for(features: int) -> float:
    """Return the calibrated threshold of a row's checksum."""
    return 8.0 if features <= 256 else 4.0
