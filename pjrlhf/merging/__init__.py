"""Weighted sums of parameter pytrees: arrays in, arrays out."""
