"""What the texts in a `.pt2` archive may stand for: names, operators, symbolic sizes, trees of arguments, and nothing else.

Each check takes a text and where it stands, and gives the text back or raises `Refused`.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from typing import Any

import torch

from dreamquant.errors import ModelError

_LONGEST_EXPRESSION, _LARGEST_POWER = 1000, 8


class Refused(Exception):  # noqa: N818 - the archive is what is wrong
    """What torch would, or might, run as code."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def name(text: str, place: str) -> str:
    """A name that torch may write into Python as it is."""
    if text and (not text.isidentifier() or keyword.iskeyword(text)):
        raise Refused(f"{place} is {shown(text)}, which is no name")
    return text


_DOTTED = re.compile(r"[\w\- .]*")  # nothing that would end a text in Python


def dotted(text: str, place: str) -> str:
    if not _DOTTED.fullmatch(text) or any(part.startswith("__") for part in text.split(".")):
        raise Refused(f"{place} is {shown(text)}, which is no name")
    return text


def free(text: str, place: str) -> str:  # noqa: ARG001 - it is one of several
    """A text that is a value to torch, never a name."""
    return text


def refused(text: str, place: str) -> str:
    raise Refused(f"{place} is {shown(text)}: objects and functions are no data")


def dialect(text: str, place: str) -> str:
    if text not in ("", "ATEN", "TRAINING"):
        raise ModelError(f"{place} is {shown(text)}; known: ATEN, TRAINING")
    return text


def shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


# operators


_PYTHON = _words(
    "_operator.add _operator.and_ _operator.eq _operator.floordiv _operator.ge _operator.getitem _operator.gt _operator.le "
    "_operator.lt _operator.mod _operator.mul _operator.ne _operator.neg _operator.or_ _operator.pos _operator.sub "
    "_operator.truediv math.ceil math.floor math.trunc torch.sym_float torch.sym_int torch.sym_ite torch.sym_max torch.sym_min "
    "torch.sym_not torch.sym_sqrt"
)
_GRADIENTS = "torch.ops.higher_order.wrap_with_set_grad_enabled"  # what torch.no_grad() becomes
_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")
# beginning with "_" are torch's inner operators, not all of which check what they are given; taken are the core ones and these
_INNER = _words(
    "_convolution _prelu_kernel _scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu _unsafe_view "
    "_weight_norm __and__ __or__ __xor__"
)
# that return no tensor
_CHECKS = _words(
    "_assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async _functional_assert_scalar _local_scalar_dense "
    "item numel sym_constrain_range sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride"
)
_STORAGE = {"set_", "set_data", "resize_", "resize_as_"}  # that give a tensor other memory
_VALUES = {"Tensor", "int", "float", "bool", "number", "complex", "Device", "Generator", "NoneType"}
_MODES = _words(  # texts that choose among ways to compute
    "approximate assert_msg equation indexing interpolation mode norm ord pad_mode padding padding_side reduce rounding_mode side"
)
_WRAPPED = re.compile(r"(?:Optional|List)\[(.*)\]")


def operator(text: str, place: str) -> str:
    """An operator that computes tensors from tensors, numbers and modes, or an arithmetic one on sizes."""
    if text in _PYTHON or text == _GRADIENTS:
        return text
    found = _ATEN.fullmatch(text)
    packet = getattr(torch.ops.aten, found[1], None) if found else None
    overload = getattr(packet, found[2], None) if found and isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not found or not isinstance(overload, torch._ops.OpOverload):
        raise Refused(f"{place} is {shown(text)}, which is no operator of torch's aten")
    if not _computes(found[1], overload):
        raise Refused(f"{place} is {text}, which does more than compute a tensor")
    return text


def _computes(name: str, overload: torch._ops.OpOverload) -> bool:
    if name in _CHECKS:
        return True
    if name in _STORAGE or (name.startswith("_") and name not in _INNER and torch.Tag.core not in overload.tags):
        return False
    signature: Any = overload._schema
    given = all(
        _plain(argument.type) in _VALUES or (_plain(argument.type) == "str" and argument.name in _MODES)
        for argument in signature.arguments
    )
    returned = [_plain(one.type) for one in signature.returns]
    return given and bool(returned) and all(kind == "Tensor" for kind in returned)


def _plain(kind: Any) -> str:
    """A type of an operator's schema without the lists and options around it."""
    text = str(kind)
    while inner := _WRAPPED.fullmatch(text):
        text = inner[1]
    return text


# symbolic sizes


SYMBOL = re.compile(r"[a-z]{1,4}\d{1,4}")
_CLASSES = _words(
    "Abs Add And CeilDiv CeilToInt CleanDiv Equality FloatTrueDiv FloorDiv FloorToInt GreaterThan Identity IntTrueDiv Integer "
    "LessThan Max Min Mod ModularIndexing Mul Not Or Pow PythonMod Rational RoundToInt StrictGreaterThan StrictLessThan ToFloat "
    "TruncToFloat TruncToInt Unequality"
)
_DIGITS = re.compile(r"-?[0-9.]{1,20}")


def expression(text: str, place: str) -> str:
    """A symbolic size as sympy's `srepr` writes it: calls of its classes on numbers and symbols."""
    try:
        if len(text) > _LONGEST_EXPRESSION:
            raise ValueError
        _check_expression(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise Refused(f"{place} is {shown(text)}, which is no expression of sizes") from None
    return text


def _check_expression(node: ast.expr) -> None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and abs(node.value) < 2**63:
        return
    if isinstance(node, ast.Name) and (node.id in ("true", "false", "int_oo") or SYMBOL.fullmatch(node.id)):
        return
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError
    if node.func.id == "Symbol":
        _check_symbol(node)
    elif node.func.id == "Float":
        _check_float(node)
    elif node.func.id in _CLASSES and not node.keywords:
        if node.func.id == "Pow":
            _check_power(node)
        for argument in node.args:
            _check_expression(argument)
    else:
        raise ValueError


def _check_symbol(node: ast.Call) -> None:
    name = node.args[0] if len(node.args) == 1 else None
    if not isinstance(name, ast.Constant) or not isinstance(name.value, str) or not SYMBOL.fullmatch(name.value):
        raise ValueError
    if not all(isinstance(word.value, ast.Constant) and isinstance(word.value.value, bool) for word in node.keywords):
        raise ValueError


def _check_float(node: ast.Call) -> None:
    values = [value.value if isinstance(value, ast.Constant) else None for value in node.args]
    words = [word.value.value if isinstance(word.value, ast.Constant) else None for word in node.keywords]
    if len(values) != 1 or not _DIGITS.fullmatch(str(values[0])) or not all(type(word) is int and word < 100 for word in words):
        raise ValueError


def _check_power(node: ast.Call) -> None:
    """Only small powers of a symbol: others take longer than anybody waits."""
    base, exponent = node.args
    power = exponent.args[0] if isinstance(exponent, ast.Call) and len(exponent.args) == 1 else exponent
    if isinstance(power, ast.UnaryOp) and isinstance(power.op, ast.USub):
        power = power.operand
    known = isinstance(power, ast.Constant) and type(power.value) is int and power.value <= _LARGEST_POWER
    if not known or not (isinstance(base, ast.Name) or (isinstance(base, ast.Call) and ast.unparse(base.func) == "Symbol")):
        raise ValueError


# trees of arguments


def tree(text: str, place: str) -> str:
    """How arguments are nested: tuples, lists, and dictionaries of names."""
    version, tree = json.loads(text)
    if version != 1:
        raise ModelError(f"{place} is of version {version}; 1 is known")
    return json.dumps([1, _branch(tree, place)])


def _branch(tree: Any, place: str) -> dict[str, Any]:
    kind, context = tree["type"], tree["context"]
    children = [_branch(child, place) for child in tree["children_spec"]]
    if kind == "builtins.dict":
        keys = json.loads(context)
        if not all(isinstance(key, str) for key in keys):
            raise Refused(f"{place} nests arguments under {shown(context)}; names are data")
        context = json.dumps([name(key, place) for key in keys])
    elif (kind, context) not in ((None, None), ("builtins.tuple", "null"), ("builtins.list", "null")):
        raise Refused(f"{place} nests arguments in {shown(str(kind))}; tuples, lists and dictionaries are data")
    return {"type": kind, "context": context, "children_spec": children}
