"""A checkpoint as it is stored, and its weights in few bits."""
