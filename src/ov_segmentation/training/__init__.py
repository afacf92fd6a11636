"""Training: recipes, the loop, checkpoints, contrastive pre-training on scenes."""
