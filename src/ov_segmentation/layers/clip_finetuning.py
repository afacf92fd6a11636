"""Which parameters of a `CLIPModel` are trained along with a segmentation model (CAT-Seg, ESC-Net)."""

from __future__ import annotations

from transformers import CLIPModel


def set_trained_clip_parameters(clip: CLIPModel, mode: str, has_stem: bool = False) -> None:
    """Set `requires_grad` of every parameter.

    Args:
        clip: the model.
        mode: "attention" (weights of all query and value projections, in both towers), "blocks" (all transformer
            blocks), "all", or "none".
        has_stem: a convolutional trunk is in the place of the patch embedding: it is trained, and the position
            embeddings with it, unless the mode is "none".
    """
    clip.requires_grad_(mode == "all")
    clip.logit_scale.requires_grad_(False)  # the cost map is a plain cosine
    if mode in ("all", "none"):
        return
    if has_stem:
        clip.vision_model.embeddings.requires_grad_(True)
    for tower in (clip.vision_model, clip.text_model):
        for block in tower.encoder.layers:
            if mode == "blocks":
                block.requires_grad_(True)
            else:
                block.self_attn.q_proj.weight.requires_grad_(True)
                block.self_attn.v_proj.weight.requires_grad_(True)
