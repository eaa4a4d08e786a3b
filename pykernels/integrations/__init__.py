"""Our kernels inside other libraries: a module for each, to be imported by name."""
