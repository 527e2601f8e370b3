"""Training with everything on one device: data set, drawing, sentences and losses, without a wait for the host."""
