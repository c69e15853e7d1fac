"""Losses that sample: fixed functions within an outer step."""
