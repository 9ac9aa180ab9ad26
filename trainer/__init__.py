"""The trainer: spans in, weights out. The only place where torch lives; this face imports none of it."""
