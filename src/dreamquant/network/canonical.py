"""One spelling for every operation, so that later stages meet each in a single form."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dreamquant.network import writes
from dreamquant.network.edit import unused_name
from dreamquant.network.einsum import einsum
from dreamquant.network.graph import aten
from dreamquant.network.notes import Notes, exported_value, set_notes


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - evaluation only
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T * scale + mask) v, as two matrix products that can be quantized."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-2, -1))
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, device=scores.device).triu(1)
    if attn_mask is not None:
        scores = scores + (torch.where(attn_mask, 0.0, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask)
    return torch.matmul(torch.softmax(scores, -1), value)


def rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any) -> Tensor:
    """What a slope drawn from a range is in evaluation: the middle."""
    return nn.functional.leaky_relu(x, (lower + upper) / 2)


# operations that are taken apart when a program is captured
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
    aten.einsum.default: einsum,
    aten.rrelu.default: rrelu,
    aten.copy.default: writes.copy,
    aten.fill.Tensor: writes.copy,
    aten.slice_scatter.default: writes.slice_scatter,
    aten.select_scatter.default: writes.select_scatter,
    aten.index_put.default: writes.index_put,
}

# operations that only move, copy or (in training) drop values
IDENTITIES = {
    aten.clone.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.dropout.default,
    aten.dropout_.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.lift_fresh_copy.default,
}

# by the number of spatial dimensions; what `convolution` stands for
CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
TRANSPOSED_CONVOLUTIONS = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}

# checks on the way, which compute nothing
ASSERTIONS = {
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}

LARGEST = torch.finfo(torch.float32).max

# another spelling of the same operation on the same arguments
SYNONYMS = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.relu_.default: aten.relu.default,
    aten.relu6.default: None,  # -> hardtanh(x, 0, 6), below
}


def canonicalize(graph: fx.Graph) -> None:
    """Rewrite in place: identities vanish, `view` becomes `reshape`, BatchNorm is `batch_norm` in eval mode, numbers of any
    precision are float32, a guard or other node without effect on the output is dropped."""
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:  # torch.export's input guards
            graph.erase_node(node)
        elif node.op == "call_function":
            _canonicalize_node(graph, node)
    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _in_float32)
    graph.eliminate_dead_code()


def _in_float32(value: Any) -> Any:
    """An argument for numbers in float32 in place of another precision."""
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float32
    if isinstance(value, float) and math.isfinite(value):
        return max(-LARGEST, min(LARGEST, value))  # the least double, as masks have it, would be no number
    return value


def _canonicalize_node(graph: fx.Graph, node: fx.Node) -> None:
    if node.target in ASSERTIONS:
        graph.erase_node(node)
    elif node.target is aten.copy_.default:  # what a module writes into its buffers, or its input, as it runs
        node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
        graph.erase_node(node)
    elif node.target in IDENTITIES or _is_cast_to_same(node) or _takes_all(node):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    elif node.target is aten.relu6.default:
        node.target, node.args = aten.hardtanh.default, (node.args[0], 0.0, 6.0)
    elif node.target in SYNONYMS:
        node._rename("reshape" if SYNONYMS[node.target] is aten.reshape.default else "relu")
        node.target = SYNONYMS[node.target]  # type: ignore[assignment]
    elif node.target is aten.convolution.default:
        x, weight, bias, stride, padding, dilation, transposed, more, groups = node.args
        kinds = TRANSPOSED_CONVOLUTIONS if transposed else CONVOLUTIONS
        node.target = kinds[len(stride)]  # type: ignore[arg-type]
        node._rename(str(node.target.__name__).split(".")[0])
        rest = (more, groups, dilation) if transposed else (dilation, groups)
        node.args = (x, weight, bias, stride, padding, *rest)
    elif node.target is aten._native_batch_norm_legit_no_training.default:
        node._rename("batch_norm")
        x, weight, bias, mean, var, momentum, eps = node.args
        node.target, node.args = aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False)
        for user in list(node.users):  # only the normalised tensor is used; the saved statistics are for training
            assert user.target is operator.getitem
            assert user.args[1] == 0
            user.replace_all_uses_with(node)
            graph.erase_node(user)
    elif node.target is aten.batch_norm.default:
        node.args = (*node.args[:5], False, *node.args[6:8], False)


def infer_sizes(graph: fx.GraphModule) -> None:
    """Write -1 for the one size of a `reshape` that depends on the batch, so that it needs no arithmetic on sizes."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is aten.reshape.default:
            sizes = list(node.args[1])
            symbolic = [index for index, size in enumerate(sizes) if isinstance(size, fx.Node)]
            if len(symbolic) == 1 and -1 not in sizes:
                sizes[symbolic[0]] = -1
                node.update_arg(1, sizes)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _is_cast_to_same(node: fx.Node) -> bool:
    """Whether a cast changes nothing where all precisions are one."""
    if node.target not in (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout):
        return False
    value, before = exported_value(node), exported_value(node.args[0])
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return False
    return value.dtype == before.dtype or (value.is_floating_point() and before.is_floating_point())


def _takes_all(node: fx.Node) -> bool:
    """Whether a slice leaves nothing out: it has the sizes of what it is from, those that depend on the batch by name."""
    if node.target is not aten.slice.Tensor:
        return False
    value, before = exported_value(node), exported_value(node.args[0])
    known = isinstance(value, Tensor) and isinstance(before, Tensor)
    return known and [str(size) for size in value.shape] == [str(size) for size in before.shape]


def flatten_attributes(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule around `graph` whose tensors stand under flat names, one `get_attr` node a tensor, without gradients.

    `get_attr` nodes note the tensor's dotted name as their `origin`.
    """
    root = nn.Module()
    seen: dict[int, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        first = seen.get(id(value))
        if first is not None:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            continue
        seen[id(value)] = node
        set_notes(node, Notes(origin=str(node.target)))
        name = unused_name(root, str(node.target))
        if isinstance(value, Tensor):
            root.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format))
        else:
            setattr(root, name, value)
        node.target = name
    return fx.GraphModule(root, graph)
