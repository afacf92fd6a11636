"""ESC-Net: Effective SAM Combination for Open-Vocabulary Semantic Segmentation (CVPR 2025)."""
