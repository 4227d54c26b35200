"""Merging: several models of one shape become one, without training."""
