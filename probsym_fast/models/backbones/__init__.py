"""Networks to symmetrize, including those of other libraries."""
