"""Ranges: which part of its values a grid should cover. One file a method.

The contract: `name(values, *, bits, symmetric, ...) -> (low, high)`. `values` is (groups, images, n): one group for a tensor,
one a channel for per-channel weights; one image for weights; or `Values`, which stand for more than memory holds. `low` and
`high` are (groups,). A pure function of tensors.
"""
