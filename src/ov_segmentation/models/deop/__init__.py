"""DeOP: one pass of CLIP for all proposals, with severed patches and learned classification anchors."""
