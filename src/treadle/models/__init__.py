"""Whole models, built from the parts in treadle.nn."""
