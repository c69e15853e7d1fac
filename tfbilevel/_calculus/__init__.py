"""Derivatives, vector arithmetic on nests and loops; no bilevel words."""
