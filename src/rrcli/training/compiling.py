"""`--compile`: compile the decoder layers with torch.compile.

Only the forward of a layer is compiled, not its call, so the recursion's hooks around it stay plain Python. Equal
layers share one compilation, whereas compiling a whole model takes minutes. Shapes are dynamic, as every batch has
another width.
"""

from __future__ import annotations

from typing import Any

import torch

from rrcli.errors import RRError
from rrcli.recursion.families import find_layout
from rrcli.upstream import has_cpp_compiler


def compile_layers(model: Any) -> None:
    """Let every decoder layer compile itself when it first runs.

    Raises:
        RRError: the model is on a CPU and there is no C++ compiler.
    """
    if model.device.type == "cpu" and not has_cpp_compiler():
        raise RRError(
            "--compile needs a C++ compiler, and none works here",
            "Install g++ (or name another in the variable CXX), or leave --compile out.",
        )
    for layer in model.get_submodule(find_layout(model)[0].layers):
        layer.forward = torch.compile(layer.forward, dynamic=True)
