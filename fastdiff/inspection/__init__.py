"""Says what a file or folder is: checkpoints, runs, jobs, images, scores, and what other programs wrote."""
