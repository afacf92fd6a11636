"""CAT-Seg: Cost Aggregation for Open-Vocabulary Semantic Segmentation (Cho et al., CVPR 2024)."""
