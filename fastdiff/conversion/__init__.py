"""Writing networks for other programs, and reading theirs: safetensors, the original's files, diffusers."""
