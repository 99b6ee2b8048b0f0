"""The decoder as graph code: its blocks, their operators, and the type of a family member's record."""
