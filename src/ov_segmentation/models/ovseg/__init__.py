"""OVSeg: MaskFormer proposals classified by a CLIP that is adapted to masked crops; SimBaseline is a case of it."""
