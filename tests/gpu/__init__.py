"""Checks that need a CUDA device: `make test-gpu`, or `python -m tests.gpu` in an environment that has SGLang.

They take the standard library's unittest, and modules without a `test_` in their names, so that they run where only
SGLang and this package are installed, and so that pytest leaves them alone. Modules of checks import neither before
they run: they are listed on any machine.
"""
