"""Reference model of vidmem_kernels: compress a video's history to a short context and read it back."""
