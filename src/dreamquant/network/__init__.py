"""In: whatever a model came in becomes one flat graph of ATen operations."""
