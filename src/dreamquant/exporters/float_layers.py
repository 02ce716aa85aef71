"""Layers of an integer plan that a runtime has to compute in float all the same, as a tensor beside them was left in float.

ONNX Runtime has its fast float kernels for stored floats only: weights behind a DequantizeLinear are dequantized in every
run, and a convolution by them is computed the slow way. Floats on the levels of the weight's grid take more bytes, and no time.
"""

from __future__ import annotations

from torch import fx

from dreamquant.network.notes import notes
from dreamquant.network.operators import CONVOLUTIONS, TRANSPOSED, WEIGHTED, argument, is_call
from dreamquant.quantization.grid import Grid
from dreamquant.quantization.moves import unmoved
from dreamquant.quantization.sites import merged_result
from dreamquant.quantization.student import Student, weight_quantizer


def float_layers(student: Student) -> dict[fx.Node, bool]:
    """The layers with 8-bit weights that have no integer kernel in the file, and whether what they read is quantized.

    A convolution needs both its ends on grids, a linear layer its input. Layers in fewer bits keep their integers, as they have
    no integer kernel anyhow and are quantized for their size; so do all of a plan for other ends than an integer runtime.
    """
    if student.plan.placement != "integer":
        return {}
    grids = {tensor.quantizer: tensor.grid for tensor in student.tensors()}
    found = {}
    for node in student.network.graph.graph.nodes:
        grid = grids.get(weight_quantizer(node)) if is_call(node, WEIGHTED - TRANSPOSED) else None  # type: ignore[arg-type]
        if isinstance(grid, Grid) and grid.bits > 4:
            reads = _is_quantized(unmoved(argument(node, 0)))
            gives = not is_call(node, CONVOLUTIONS) or all(_is_quantized(user) for user in merged_result(node).users)
            if not (reads and gives):
                found[node] = reads
    return found


def _is_quantized(node: fx.Node) -> bool:
    return notes(node).kind == "activation"
