"""Ways to choose what stays, one a file."""

from .magnitude import Magnitude
from .method import Method
from .psp import PSP

__all__ = ["PSP", "Magnitude", "Method"]
