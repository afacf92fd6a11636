"""Data: synthetic scenes, benchmark registry, builders of Hugging Face datasets, paired augmentations."""
