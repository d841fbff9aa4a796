"""ctd-scale: generative recommendation with continuous-token diffusion, distributed with Ray."""

__version__ = "0.1.0"
