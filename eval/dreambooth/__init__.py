"""dreambooth_bench: DreamBooth with and without agent attention in training and in sampling (figure 8 of the paper)."""
