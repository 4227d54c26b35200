"""Before a run: what it will need, and which technique fits."""
