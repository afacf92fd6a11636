"""Key rules for CLIP in the layout of OpenAI and open_clip."""

from __future__ import annotations

from .conversion import Drop, Rule, split_in_three, transposed


def clip_block_rules(source: str, target: str) -> list[Rule]:
    """Rules for the transformer blocks `<source>.resblocks.<i>` -> `<target>.encoder.layers.<i>`."""
    old, new = rf"{source}\.resblocks\.(\d+)", rf"{target}.encoder.layers.\1"
    return [
        Rule(
            rf"{old}\.attn\.in_proj_(weight|bias)",
            tuple(rf"{new}.self_attn.{name}_proj.\2" for name in "qkv"),
            split_in_three,
        ),
        Rule(rf"{old}\.attn\.out_proj\.(weight|bias)", rf"{new}.self_attn.out_proj.\2"),
        Rule(rf"{old}\.ln_([12])\.(weight|bias)", rf"{new}.layer_norm\2.\3"),
        Rule(rf"{old}\.mlp\.c_fc\.(weight|bias)", rf"{new}.mlp.fc1.\2"),
        Rule(rf"{old}\.mlp\.c_proj\.(weight|bias)", rf"{new}.mlp.fc2.\2"),
    ]


def clip_vision_rules(source: str = "visual", target: str = "clip.") -> list[Rule]:
    """Rules for a ViT `<source>.*` -> `<target>vision_model.*` and `<target>visual_projection`."""
    vision = f"{target}vision_model"
    return [
        Rule(rf"{source}\.class_embedding", f"{vision}.embeddings.class_embedding"),
        Rule(rf"{source}\.positional_embedding", f"{vision}.embeddings.position_embedding.weight"),
        Rule(rf"{source}\.conv1\.weight", f"{vision}.embeddings.patch_embedding.weight"),
        Rule(rf"{source}\.ln_pre\.(weight|bias)", rf"{vision}.pre_layrnorm.\1"),
        *clip_block_rules(rf"{source}\.transformer", vision),
        Rule(rf"{source}\.ln_post\.(weight|bias)", rf"{vision}.post_layernorm.\1"),
        Rule(rf"{source}\.proj", f"{target}visual_projection.weight", transposed),
    ]


def clip_text_rules(
    source: str = "", text_model: str = "clip.text_model", projection: str = "clip.text_projection"
) -> list[Rule | Drop]:
    """Rules for a text tower `<source>token_embedding ...` -> `<text_model>.*` and `<projection>.weight`.

    Args:
        source: a regular expression in front of the names, its dot included.
    """
    return [
        Rule(rf"{source}token_embedding\.weight", f"{text_model}.embeddings.token_embedding.weight"),
        Rule(rf"{source}positional_embedding", f"{text_model}.embeddings.position_embedding.weight"),
        *clip_block_rules(rf"{source}transformer", text_model),
        Rule(rf"{source}ln_final\.(weight|bias)", rf"{text_model}.final_layer_norm.\1"),
        Rule(rf"{source}text_projection", f"{projection}.weight", transposed),
        Drop(rf"{source}attn_mask", "the causal mask, a constant that transformers builds itself"),
        Drop(rf"{source}(input_resolution|context_length|vocab_size)", "a size, which the configuration holds"),
    ]


def clip_rules(source: str = "", target: str = "clip.") -> list[Rule | Drop]:
    """Rules for a whole CLIP with a ViT -> a `CLIPModel` called `<target>`."""
    return [
        *clip_vision_rules(f"{source}visual", target),
        *clip_text_rules(source, f"{target}text_model", f"{target}text_projection"),
        Rule(rf"{source}logit_scale", f"{target}logit_scale", lambda value: value.reshape(())),
    ]
