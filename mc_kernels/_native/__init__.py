"""What build_native.py makes of csrc/: the library, its Python extension and its header. See `mc_kernels.native`."""
