"""One command for a machine with a GPU: the tests marked `gpu`, then the kernels against their targets."""
