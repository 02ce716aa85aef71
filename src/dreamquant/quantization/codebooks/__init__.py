"""Codebooks: weights on levels at any distance. One file a method.

The contract: `name(rows, *, bits, ...) -> levels`. `rows` is (groups, n): one group for a tensor, one a channel. `levels` is
(groups, 2^bits), float32, ascending, 0 among them; a group that needs fewer repeats some. A pure function of tensors.
"""
