"""minisd3: Stable Diffusion 3 and 3.5 in compact PyTorch, with a small family of models that runs anywhere."""
