"""Networks to be symmetrized, from others' libraries too."""
