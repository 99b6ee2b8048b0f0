"""What the members of the family are written in: the decoder, its blocks, and the operators that they emit."""
