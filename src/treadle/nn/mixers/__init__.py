"""Token mixers: what lets one position see others."""
