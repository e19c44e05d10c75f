"""DualPath for SGLang: one request's KV cache, loaded over the storage NICs of both its servers."""

__version__ = "0.1.0"
