"""Quantisation: weights in fewer bits, run from their packed form."""
