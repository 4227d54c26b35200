"""Verifiers by name: each module has `marks(problem, completion)`, in [0, 1]."""
