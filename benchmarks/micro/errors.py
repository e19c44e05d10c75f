"""What stops a microbenchmark with one sentence for the user."""


class BenchmarkError(RuntimeError):
    """This machine lacks something, or what was measured did not do what it was meant to; the text says which."""
