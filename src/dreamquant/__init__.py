"""Quantize a trained neural network when its training data may not be touched."""
