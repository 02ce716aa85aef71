"""Transforms: another form of the same function, that quantizes better. One file a method.

The contract: `name(network, *, bits, ...) -> Network` with a graph of its own that computes the same function; the network given
is not changed. `bits` is the number of bits that weights will get. A transform that adds or removes nodes returns
`network.rebuilt(graph)`: what comes out is then written as a new ONNX graph; one that changes stored tensors only, by
`network.edit`, returns `network.with_graph(graph)`.
"""
