"""Generation on the processor in C++, compiled on first use."""
