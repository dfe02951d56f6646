"""The commands of `mc` that use one memory, one a file; `terminal` and `options` are what they share."""
