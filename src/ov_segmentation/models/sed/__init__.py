"""SED: hierarchical ConvNeXt CLIP, cost maps, gradual fusion, category early rejection (Xie et al., CVPR 2024)."""
