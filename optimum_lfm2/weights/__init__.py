"""Reading the weights of a checkpoint, and quantising them to 4 or 8 bits."""
