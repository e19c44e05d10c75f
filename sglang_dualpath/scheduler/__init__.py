"""Subclasses of SGLang's scheduler and of the decode side's queues."""
