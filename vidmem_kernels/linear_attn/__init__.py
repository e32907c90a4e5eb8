"""Linear attention: a feature map replaces softmax, so that a state of fixed size summarises all past tokens."""
