"""Reading and writing the files of others: Hugging Face folders and GGUF."""
