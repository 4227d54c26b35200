"""Optimisers, schedules, clipping."""
