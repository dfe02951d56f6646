"""Training of GistNet and LensNet on a frozen base model."""
