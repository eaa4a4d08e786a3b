"""Public functions: docstring, checks, autograd; one file per op."""
