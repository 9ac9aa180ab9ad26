"""The loops, each readable as pseudo-code."""
