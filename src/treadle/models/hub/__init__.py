"""Weights and metadata to and from Hugging Face folders, GGUF files and public sources."""
