"""Reads the weights in a pickled torch module without importing its classes or running code from the file.

Some checkpoints are whole modules, `torch.save(model)`. Ordinary unpickling imports the author's code, and can run any
code. Here each name in the pickle becomes a tensor, an OrderedDict, or an empty shell that only stores its state.
"""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class Shell:
    """Replaces an object of any other class, or a function's result: does nothing, but stores its state."""

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Shell:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:  # for a subclass of dict
        pass

    def append(self, *args: Any) -> None:  # for a subclass of list
        pass

    add = extend = append


def _tensor(*args: Any) -> torch.Tensor:
    return torch._utils._rebuild_tensor_v2(*args)


def _parameter(data: torch.Tensor, *args: Any) -> torch.Tensor:
    return data


KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return KNOWN.get((module, name)) or type("Shell", (Shell,), {})


def read_module(file: Path) -> dict[str, torch.Tensor]:
    """Parameters by their dotted names, like the module's `state_dict()` but without buffers.

    Raises ValueError if the file holds no module, and the errors of torch and pickle for a damaged file.
    """
    inert = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="inert")
    with open(file, "rb") as handle:
        if handle.read(4) != b"PK\x03\x04":  # torch's older format, which `load` reads in several pieces
            raise ValueError("not a file of torch.save since PyTorch 1.6")
    parameters = dict(_parameters(torch.load(file, map_location="cpu", weights_only=False, pickle_module=inert), ""))
    if not parameters:
        raise ValueError("holds neither tensors by name nor a module with parameters")
    return parameters


def _parameters(module: Any, prefix: str) -> Any:
    """Yields (name, tensor) of a module and its submodules, from nn.Module's `_parameters` and `_modules`."""
    state = module.state if isinstance(module, Shell) and isinstance(module.state, dict) else {}
    for name, value in (state.get("_parameters") or {}).items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
    for name, child in (state.get("_modules") or {}).items():
        yield from _parameters(child, f"{prefix}{name}.")
