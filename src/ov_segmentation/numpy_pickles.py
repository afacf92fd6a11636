"""Plain pickles of numpy arrays, as detectron2 stores weights, read without running code from them.

Such a file (`R-103.pkl`: a dictionary of arrays, written by Python 2 or 3) is no checkpoint of `torch.save`, and pickle
would call whatever it names. Here nothing but containers, numbers, strings and numpy's own arrays can be made.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

# numpy's functions are private and have moved between versions; arrays and scalars name them themselves
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.float32(0).__reduce__()[0]
_ALLOWED: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "collections.OrderedDict": OrderedDict,
}
for _package in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_package}.multiarray._reconstruct"] = _RECONSTRUCT
    _ALLOWED[f"{_package}.multiarray.scalar"] = _SCALAR


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes into old protocols as a call of `_codecs.encode`."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"class _codecs.encode with {encoding}")
    return text.encode(encoding)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        try:
            return _ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"class {module}.{name}") from None


def read_numpy_pickle(path: Path) -> Any:
    """The content of a pickle: containers, numbers, strings, numpy arrays.

    Raises:
        pickle.UnpicklingError: it holds anything else, or is damaged.
    """
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()
