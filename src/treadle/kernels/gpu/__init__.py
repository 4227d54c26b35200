"""Kernels in Triton, each beside a readable definition in torch. Import a module to need Triton."""
