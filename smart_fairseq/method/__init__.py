"""The method's mathematics: files that import torch, the standard library and each other, nothing else."""
