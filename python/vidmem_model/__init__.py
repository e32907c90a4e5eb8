"""Reference model of vidmem_kernels: compress a video's history to a short context and read it back."""

from . import _requirements

__version__ = "0.1.0"
_requirements.check(__version__)
