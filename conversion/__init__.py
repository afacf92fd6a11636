"""Command lines that convert original checkpoints; the rules are in `ov_segmentation.models.<m>.convert_<m>`."""
