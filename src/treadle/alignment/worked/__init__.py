"""Worked solutions, one file a family: `steps(metadata)` writes the lines before the answer."""
