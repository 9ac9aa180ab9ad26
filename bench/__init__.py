"""One module a question; each prints one JSON object as its last line."""
