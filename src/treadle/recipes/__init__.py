"""Functions that return a Run or a Pipeline."""
