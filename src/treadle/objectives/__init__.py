"""Pure losses: a model and a batch in, a sum and its divisor out."""
