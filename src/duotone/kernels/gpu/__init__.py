"""The W4A8 linear on NVIDIA GPUs that multiply FP8, in Triton."""
