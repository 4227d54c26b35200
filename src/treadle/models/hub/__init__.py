"""Reading and writing the checkpoints of others: Hugging Face folders and GGUF files."""
