"""Subclasses of SGLang's HiCache: the controller's page getter and hit query, and the radix trees of both sides."""
