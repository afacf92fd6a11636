"""Initial weights of a small Segment Anything from which minutes of training are enough."""

from __future__ import annotations

import torch
from torch import nn
from transformers import SamModel
from transformers.models.sam.modeling_sam import SamAttention

from ..layers.initialization import init_torch_defaults
from ..layers.sam_blocks import init_prompt_encoder

# at the start: of projections of queries and keys, of norms before them, of what the kind of a prompt adds to its place
ATTENTION_GAIN, NORM_GAIN, LABEL_GAIN = 2.5, 0.3, 0.1
# of the frequencies of places: the fewer there are, the lower they have to be
TABLE_GAIN = 0.7


@torch.no_grad()
def init_for_short_training(model: SamModel) -> None:
    """Initialise a SAM so that minutes are enough to learn where its prompts are.

    From the weights of transformers (normal, 0.02) or of torch, masks are the same for all prompts of a picture after
    a thousand steps: signals shrink in every layer of the decoder, and attention that is nearly uniform does not tell
    positions apart. So projections keep the size of what they are given (normal, fan-in), those of queries and keys
    between prompts and picture are equal, and places outweigh what is there: attention starts as a kernel that is
    highest where both are at the same place. It does so with one or two heads; those of four are too narrow at a width
    of 32. The table of positions is fixed, as in the original.
    """
    for module in model.vision_encoder.modules():
        init_torch_defaults(module)
    nn.init.normal_(model.vision_encoder.pos_embed, std=0.02)
    for module in (*model.mask_decoder.modules(), *model.prompt_encoder.modules()):
        init_prompt_encoder(module)
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            # a transposed convolution of stride 2 reads each input channel once
            inputs = len(module.weight) if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
            nn.init.normal_(module.weight, std=inputs**-0.5)
            nn.init.zeros_(module.bias)
    encoder, transformer = model.prompt_encoder, model.mask_decoder.transformer
    for labels in (*encoder.point_embed, encoder.not_a_point_embed, encoder.no_mask_embed):
        labels.weight.mul_(LABEL_GAIN)
    for module in (*transformer.layers.modules(), model.vision_encoder.neck.layer_norm2):
        if isinstance(module, nn.LayerNorm):
            nn.init.constant_(module.weight, NORM_GAIN)
    between = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        between += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in between:
        _start_as_kernel(attention)
    table = encoder.shared_embedding
    table.positional_embedding.mul_(TABLE_GAIN)
    model.shared_image_embedding.positional_embedding.copy_(table.positional_embedding)
    for positions in (table, model.shared_image_embedding):
        positions.requires_grad_(False)


def _start_as_kernel(attention: SamAttention) -> None:
    nn.init.orthogonal_(attention.q_proj.weight, gain=ATTENTION_GAIN)
    attention.k_proj.weight.copy_(attention.q_proj.weight)
