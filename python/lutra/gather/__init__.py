"""Gather: a table and addresses in; the weighted sum of the rows found there out."""

from ._bag import TouchedRows, bag, bag_grad
from ._bag_packed import bag_packed
from ._csr import bag_csr
from ._packed import pack_rows, unpack_rows
from ._pieces import Pieces, bag_pieces
from ._row_dots import row_dots
from ._rows import QuantizedRows, dequantize_rows, quantize_rows
from ._senses import Senses, senses
from ._tables import tables
from ._train import tensor_train
from ._update import row_state, update_bags, update_rows

__all__ = [
    "Pieces",
    "QuantizedRows",
    "Senses",
    "TouchedRows",
    "bag",
    "bag_csr",
    "bag_grad",
    "bag_packed",
    "bag_pieces",
    "dequantize_rows",
    "pack_rows",
    "quantize_rows",
    "row_dots",
    "row_state",
    "senses",
    "tables",
    "tensor_train",
    "unpack_rows",
    "update_bags",
    "update_rows",
]
