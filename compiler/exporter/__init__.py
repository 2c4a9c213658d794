"""Program out: a new model with sparse operators in the places of layers, a model of one layer, files on disk."""

from .extract import layer_model
from .files import save, session_source
from .rewrite import DOMAIN, OP_TYPE, VERSION, SparseOp, export

__all__ = ["DOMAIN", "OP_TYPE", "VERSION", "SparseOp", "export", "layer_model", "save", "session_source"]
