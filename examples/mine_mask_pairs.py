"""Mine pairs of masked crop and noun for the adaptation of CLIP.

`python examples/mine_mask_pairs.py --model runs/ovseg_swin_b_coco/model --data data/coco_captions --output pairs`

The model proposes masks, a tagger finds the nouns of the captions, and CLIP picks the mask that fits each noun best.
Start the same command again to continue. Several processes share the work: `accelerate launch --num_processes 4
examples/mine_mask_pairs.py ...`. The result is a dataset: `load_dataset("pairs")`.

The four cases of the paper's Table 2: --masks proposals|annotation times --nouns caption|classes.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoProcessor

from ov_segmentation import AutoModelForOpenVocabularySegmentation
from ov_segmentation.cli_options import at_least_one
from ov_segmentation.data.mining import MiningOptions, PairMiner
from ov_segmentation.data.mining_run import MiningError, MiningRun, SourcePictures, settings_of
from ov_segmentation.data.nouns import find_tagger
from ov_segmentation.download_errors import LoadingError
from ov_segmentation.process_group import process_group_ended


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, mine, print the counts."""
    options = parse(arguments)
    mining = MiningOptions(
        masks=options.masks,
        nouns=options.nouns,
        captions_per_image=options.captions_per_image,
        phrases=options.phrases,
        singular=options.singular,
        min_area=options.min_area,
        min_score=options.min_score,
        deduplicate=options.deduplicate,
        crop_batch_size=options.crop_batch_size,
    )
    state = PartialState(cpu=options.cpu)
    try:
        loading = {}
        if mining.needs_annotation:
            loading = {name: getattr(options, name) for name in ("class_names", "ignore_index", "reduce_labels")}
        columns = {"caption_column": options.caption_column, "image_column": options.image_column}
        pictures = SourcePictures(options.data, options.split, mining, **columns, **loading)
        columns["caption_column"] = options.caption_column or pictures.caption_column or "caption"
        name, tagger = find_tagger(options.tagger) if mining.nouns == "caption" else (None, None)
        num_pictures = len(pictures) if options.max_samples is None else min(options.max_samples, len(pictures))
        settings = settings_of(
            mining,
            model=options.model,
            data=options.data,
            split=options.split,
            tagger=name,
            use_prompts=options.use_prompts,
            **columns,
            **loading,
        )
        run = MiningRun(options.output, settings, num_pictures, options.shard_size)
        with state.main_process_first():
            if state.is_main_process:
                run.claim()
    except (OSError, ImportError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    hidden = not state.is_local_main_process
    progress = functools.partial(tqdm, desc="mining", unit="picture", disable=hidden)
    try:
        miner = PairMiner(*load(options, state.device), mining, tagger, pictures.class_names)
        run.work(pictures, miner, state.process_index, state.num_processes, progress)
    except (MiningError, LoadingError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    state.wait_for_everyone()
    if state.is_main_process:
        print(json.dumps(run.summary(), indent=1, ensure_ascii=False))


def load(options: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, object]:
    """Model and processor. The model's CLIP sees crops as a pre-trained one does unless --use-prompts is given."""
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(options.model, dtype=torch.float32)
    if model.config.model_type != "ovseg":
        sys.exit(f"{options.model} is a {model.config.model_type} model; pairs are mined with an OVSeg model.")
    if not options.use_prompts:
        model.set_visual_prompts("none")
    return model.to(device).eval(), AutoProcessor.from_pretrained(options.model)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of an OVSeg model")
    parser.add_argument("--data", required=True, help="folder or Hub id: pictures, captions or label maps")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--split", default="train")
    parser.add_argument("--masks", choices=("proposals", "annotation"), default="proposals")
    parser.add_argument("--nouns", choices=("caption", "classes"), default="caption")
    parser.add_argument("--captions-per-image", type=int, default=1, metavar="N")
    parser.add_argument("--tagger", choices=("auto", "nltk", "spacy", "textblob"), default="auto")
    parser.add_argument("--caption-column", help="a string, or a list of strings (default: captions, else caption)")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--class-names", help="of the label maps: a packaged benchmark or a JSON file")
    parser.add_argument("--ignore-index", type=int, nargs="+", help="ids in the label maps that are no class")
    parser.add_argument("--reduce-labels", action="store_true", help="id 0 is ignored and the others lowered by one")
    parser.add_argument("--max-samples", type=at_least_one, help="only the first so many pictures")
    parser.add_argument("--shard-size", type=at_least_one, default=500, help="pictures per file")
    parser.add_argument("--crop-batch-size", type=at_least_one, default=32)
    parser.add_argument("--use-prompts", action="store_true", help="choose with the model's trained visual prompts")
    parser.add_argument("--cpu", action="store_true")
    free = parser.add_argument_group("what the paper leaves open")
    free.add_argument("--min-area", type=float, default=0.0, help="smallest share of the picture that a mask covers")
    free.add_argument("--min-score", type=float, help="smallest cosine of crop and noun")
    free.add_argument("--phrases", action="store_true", help="nouns with their adjectives")
    free.add_argument("--singular", action="store_true", help="plural nouns become singular")
    free.add_argument("--deduplicate", action="store_true", help="a noun of several captions is paired once")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with process_group_ended():
        main()
