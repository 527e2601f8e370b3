"""The data set of icons on a device: its tensors, pictures drawn from them, and sentences about the pictures."""
