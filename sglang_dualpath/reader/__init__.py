"""Storage to host pages to push: the threads and the state of both read paths."""
