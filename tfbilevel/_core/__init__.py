"""The problem, its batches, the method's interface and the inner solver."""
