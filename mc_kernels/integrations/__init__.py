"""The kernels inside other engines, one package each. An engine is imported by its own package alone."""
