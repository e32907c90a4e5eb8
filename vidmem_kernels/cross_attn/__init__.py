"""Cross-attention to a memory: softmax attention with biased, windowed, block-sparse keys, and its exact merging."""
