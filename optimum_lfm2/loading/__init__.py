"""A checkpoint at the door: what it is, what is refused, and the model without weights that is made of it."""
