"""Linear attention: softmax replaced by a feature map, so that a state of fixed size stands for all past tokens."""
