"""The miniature: a toy world and the small networks that are trained on it."""
