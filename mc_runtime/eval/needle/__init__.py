"""Facts planted in long texts: are they found, and is the model able to read them where they stand."""
