"""What a precision costs, and the KV cache in 8 bits, which is chosen by that."""
