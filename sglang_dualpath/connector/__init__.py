"""Subclasses of SGLang's KV receivers and bootstrap server, and the lookup of control endpoints."""
