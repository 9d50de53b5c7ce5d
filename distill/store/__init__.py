"""The format of stored teachers: rows in files, the index that describes them, and comparing.

A store is a folder:

    index.json                            the index: identity, splits, quantities; for people, too
    train/embedding/00000.safetensors     rows of one quantity in one split, in files of a fixed number of rows
    state/RRD.3fa1c0.safetensors          the frozen tensors of a quantity, where it has some

There is one row per image and draw, draw after draw. The header of each file has the store's key and says which rows of
which quantity it holds, so that a file of another store, or of another place in this one, is not read. Every file is
whole or not there.
"""

from distill.store.differences import MISSING, Difference, differences
from distill.store.index import StoreIndex
from distill.store.quantities import Quantity, Rows
from distill.store.requests import Request
from distill.store.shards import missing_shards, write_shard
from distill.store.state import read_state, write_state
from distill.store.stored_rows import StoredRows
from distill.store.stored_teacher import STORED, StoredFeatures, StoredTeacher
from distill.store.writing import room

__all__ = [
    "MISSING",
    "STORED",
    "Difference",
    "Quantity",
    "Request",
    "Rows",
    "StoreIndex",
    "StoredFeatures",
    "StoredRows",
    "StoredTeacher",
    "differences",
    "missing_shards",
    "read_state",
    "room",
    "write_shard",
    "write_state",
]
