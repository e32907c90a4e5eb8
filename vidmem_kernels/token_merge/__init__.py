"""Token merging: match similar tokens, merge each group into one row, and spread rows back."""
