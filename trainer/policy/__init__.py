"""The policy network: loading and saving it, attention over packed rows, and the log-probs of its tokens."""
