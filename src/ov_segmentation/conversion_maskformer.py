"""Key rules of the MaskFormer that OVSeg, SimBaseline and DeOP carry in their detectron2 checkpoints."""

from __future__ import annotations

import copy
import os
import re

from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinBackbone as TransformersSwinBackbone

from .conversion import ConversionError, Drop, KeyRules, Rule, load_converted, read_checkpoint, split_in_three
from .conversion_clip import clip_rules
from .layers.configuration_maskformer import MaskProposalConfig
from .layers.maskformer import MaskProposalNetwork
from .layers.swin_backbone import SwinBackbone

NETWORK = "proposal_network."
WEIGHT = r"(weight|bias)"


def mask_proposal_rules(config: MaskProposalConfig, target: str = NETWORK) -> list[Rule | Drop]:
    """Rules for `backbone.*` and `sem_seg_head.*` -> `<target>*`, a `MaskProposalNetwork`."""
    backbone = _swin_rules if isinstance(config.backbone_config, SwinConfig) else _resnet_rules
    head, decoder = r"sem_seg_head\.predictor\.", f"{target}query_decoder."
    return [
        *backbone(f"{target}backbone."),
        *_pixel_decoder_rules(f"{target}pixel_decoder."),
        *_query_decoder_rules(rf"{head}transformer\.decoder\.", decoder),
        Rule(rf"{head}query_embed\.weight", f"{decoder}query_embedding.weight"),
        Rule(rf"{head}input_proj\.{WEIGHT}", rf"{decoder}input_projection.\1"),
        Rule(rf"{head}mask_embed\.layers\.(\d+)\.{WEIGHT}", rf"{target}mask_head.layers.\1.\2"),
        Rule(rf"{head}class_embed\.layers\.(\d+)\.{WEIGHT}", rf"{target}embedding_head.layers.\1.\2"),
        Drop(r"criterion\.empty_weight", "class weights of the loss, for the number of training classes"),
        Drop(r"clip_adapter\.pixel_(mean|std)", "CLIP's normalisation, constants"),
    ]


def adapter_rules() -> list[Rule | Drop]:
    """Rules for `clip_adapter.*`: CLIP, the "no object" embedding and the learned text prompt."""
    prompt = r"clip_adapter\.prompt_learner\."
    return [
        *clip_rules(r"clip_adapter\.clip_model\."),
        Rule(r"clip_adapter\.non_object_embedding", "no_object_embedding"),
        Rule(rf"{prompt}prefix_prompt", "text_prompt.context"),
        Drop(rf"{prompt}(start|dot|end|pad)_signal", "a row of CLIP's token embedding"),
    ]


def _swin_rules(target: str) -> list[Rule | Drop]:
    embeddings, stages = f"{target}model.swin.embeddings.", rf"{target}model.swin.encoder.layers.\1."
    block, ours = r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.", rf"{stages}blocks.\2."
    return [
        Rule(rf"backbone\.patch_embed\.proj\.{WEIGHT}", rf"{embeddings}patch_embeddings.projection.\1"),
        Rule(rf"backbone\.patch_embed\.norm\.{WEIGHT}", rf"{embeddings}norm.\1"),
        Rule(rf"{block}norm1\.{WEIGHT}", rf"{ours}layernorm_before.\3"),
        Rule(rf"{block}norm2\.{WEIGHT}", rf"{ours}layernorm_after.\3"),
        Rule(rf"{block}mlp\.(fc[12])\.{WEIGHT}", rf"{ours}mlp.\3.\4"),
        Rule(
            rf"{block}attn\.qkv\.{WEIGHT}",
            tuple(rf"{ours}attention.{name}_proj.\3" for name in "qkv"),
            split_in_three,
        ),
        Rule(rf"{block}attn\.proj\.{WEIGHT}", rf"{ours}attention.o_proj.\3"),
        Rule(
            rf"{block}attn\.relative_position_bias_table",
            rf"{ours}attention.relative_position_bias.relative_position_bias_table",
        ),
        Drop(rf"{block}attn\.relative_position_index", "a constant that the window size determines"),
        Rule(rf"backbone\.layers\.(\d+)\.downsample\.norm\.{WEIGHT}", rf"{stages}downsample.norm.\2"),
        Rule(r"backbone\.layers\.(\d+)\.downsample\.reduction\.weight", rf"{stages}downsample.reduction.weight"),
        *(
            Rule(rf"backbone\.norm{i}\.{WEIGHT}", rf"{target}model.hidden_states_norms.stage{i + 1}.\1")
            for i in range(4)
        ),
    ]


def _resnet_rules(target: str) -> list[Rule | Drop]:
    buffers = r"(weight|bias|running_mean|running_var)"
    rules: list[Rule | Drop] = [
        Drop(r"backbone\..*\.num_batches_tracked", "a counter that frozen norms do not need"),
    ]
    for i in range(3):
        stem = rf"backbone\.stem\.conv{i + 1}\."
        rules.append(Rule(rf"{stem}weight", f"{target}stem.{i}.conv.weight"))
        rules.append(Rule(rf"{stem}norm\.{buffers}", rf"{target}stem.{i}.norm.\1"))
    for i in range(4):
        part, ours = rf"backbone\.res{i + 2}\.(\d+)\.(conv[123]|shortcut)\.", rf"{target}stages.{i}.\1.\2."
        rules.append(Rule(rf"{part}weight", rf"{ours}conv.weight"))
        rules.append(Rule(rf"{part}norm\.{buffers}", rf"{ours}norm.\3"))
    return rules


def _pixel_decoder_rules(target: str) -> list[Rule | Drop]:
    source = r"sem_seg_head\.pixel_decoder\."
    rules: list[Rule | Drop] = [
        Rule(rf"{source}mask_features\.{WEIGHT}", rf"{target}mask_projection.\1"),
        Rule(rf"{source}layer_4\.weight", f"{target}fpn.stem.0.weight"),
        Rule(rf"{source}layer_4\.norm\.{WEIGHT}", rf"{target}fpn.stem.1.\1"),
    ]
    for level in (3, 2, 1):
        for theirs, ours in ((f"adapter_{level}", "proj"), (f"layer_{level}", "block")):
            layer = f"{target}fpn.layers.{3 - level}.{ours}."
            rules.append(Rule(rf"{source}{theirs}\.weight", f"{layer}0.weight"))
            rules.append(Rule(rf"{source}{theirs}\.norm\.{WEIGHT}", rf"{layer}1.\1"))
    return rules


def _query_decoder_rules(source: str, target: str) -> list[Rule | Drop]:
    layer, ours = rf"{source}layers\.(\d+)\.", rf"{target}layers.\1."
    rules: list[Rule | Drop] = [Rule(rf"{source}norm\.{WEIGHT}", rf"{target}layernorm.\1")]
    for theirs, name in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")):
        packed = tuple(rf"{ours}{name}.{part}_proj.\2" for part in "qkv")
        rules.append(Rule(rf"{layer}{theirs}\.in_proj_{WEIGHT}", packed, split_in_three))
        rules.append(Rule(rf"{layer}{theirs}\.out_proj\.{WEIGHT}", rf"{ours}{name}.o_proj.\2"))
    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    rules += [Rule(rf"{layer}norm{i + 1}\.{WEIGHT}", rf"{ours}{norm}.\2") for i, norm in enumerate(norms)]
    rules += [Rule(rf"{layer}linear{i}\.{WEIGHT}", rf"{ours}mlp.fc{i}.\2") for i in (1, 2)]
    return rules


def detectron2_rules(config: MaskProposalConfig, *extra: Rule | Drop) -> KeyRules:
    """All rules of a MaskFormer-with-CLIP checkpoint; `extra` ones are tried first."""
    return KeyRules([*extra, *mask_proposal_rules(config), *adapter_rules()])


def load_backbone_weights(network: MaskProposalNetwork | None, source: str | os.PathLike) -> None:
    """Start a proposal network's backbone from weights trained on ImageNet, in place.

    Args:
        source: for Swin a Hub id or folder of a `SwinModel` of the same size; for ResNet-c a file with detectron2's
            names (`stem.conv1.weight`, `res2.0.conv1.weight`, ...): its own `R-103.pkl`, or of `torch.save` or
            safetensors.

    Raises:
        ConversionError: keys or shapes that do not fit, or there is no network.
    """
    if network is None:
        raise ConversionError('There is no proposal network to load a backbone into: it needs proposals="maskformer".')
    backbone = network.backbone
    if isinstance(backbone, SwinBackbone):
        loaded = TransformersSwinBackbone.from_pretrained(source, config=copy.deepcopy(backbone.model.config))
        # the feature maps' norms are new, and the classifier's final norm is not used
        weights = {key: value for key, value in loaded.state_dict().items() if not key.startswith("swin.layernorm.")}
        backbone.model.load_state_dict(weights)
        return
    weights = {f"backbone.{key.removeprefix('backbone.')}": value for key, value in read_checkpoint(source).items()}
    rules = KeyRules([Drop(r"backbone\.(stem\.)?(fc|linear)\..*", "the classifier"), *_resnet_rules("")])
    load_converted(backbone, rules.convert(weights))


def is_second_adapter(key: str) -> bool:
    """Whether a key belongs to the second CLIP of SimBaseline's VOC models."""
    return re.match(r"_?region_clip_adapter\.", key) is not None
