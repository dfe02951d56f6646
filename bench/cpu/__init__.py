"""Is every op on a CPU as fast as it has to be? See `check`."""
