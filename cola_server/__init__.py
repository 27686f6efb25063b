"""The daemon on the GPU host: forward and backward pass of the frozen base model, folds, jobs."""
