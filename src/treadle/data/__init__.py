"""Records, sources, packing: from files to batches."""
