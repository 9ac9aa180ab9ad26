"""Serving the policy: the embedded engine, its HTTP face in vLLM's shape, and the push of new weights into either.

Import from the modules themselves (`trainer.serving.engine`, `.app`, `.weights`); this file stays empty so that
asking for one does not load the others.
"""
