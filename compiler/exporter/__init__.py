"""Program out: a new model with sparse operators in the places of layers, a model of one layer, files on disk."""

from .extract import layer_model
from .files import save, session_source
from .open import OpenModel, open_model
from .rewrite import DOMAIN, OP_TYPE, VERSION, SparseOp, bias_place, export
from .split import Splitter
from .storage import store_coded

__all__ = [
    "DOMAIN",
    "OP_TYPE",
    "VERSION",
    "OpenModel",
    "SparseOp",
    "Splitter",
    "bias_place",
    "export",
    "layer_model",
    "open_model",
    "save",
    "session_source",
    "store_coded",
]
