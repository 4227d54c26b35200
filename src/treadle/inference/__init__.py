"""The generation engine."""
