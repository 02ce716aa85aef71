"""Whether a quantized ONNX file, of whatever tool, keeps the rules of a target: the plan of the target's name, read as rules."""

from dreamquant.conformity.check import Conformity, check, conformity, require
from dreamquant.conformity.rules import RULES, Finding

__all__ = ["RULES", "Conformity", "Finding", "check", "conformity", "require"]
