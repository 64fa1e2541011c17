"""The definitions: each op in plain torch, usable in float64, differentiated by autograd."""
