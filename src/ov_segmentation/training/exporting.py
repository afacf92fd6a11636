"""The exported folder: model and processor as `pipeline` and `from_pretrained` load them, where they come from, a card.

`README.md` is the card, `results.jsonl` the evaluation of these very weights as a line of the ledger; both travel with
the weights to the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .. import ledger
from ..checkpoint_results import METRICS, RESULTS_FILE, finite_figures, saved_weights_digest
from ..model_card import History, is_hub_id, public_command, public_name, read_config, write_card
from .checkpointing import atomic_folder
from .recipe import Recipe, recipe_hash


def export_model(
    folder: Path,
    model: Any,
    weights: dict[str, torch.Tensor],
    processor: Any,
    recipe: Recipe,
    provenance: dict[str, Any],
    class_names: Sequence[str] = (),
    data: str | None = None,
) -> None:
    """Write model and processor with their card and results, atomically.

    Every safetensors file carries metadata: the recipe's hash and seed, and `provenance` (command, steps, figures).

    Args:
        folder: replaced if it exists.
        model: the model, for its configuration.
        weights: its state dict, gathered from all processes.
        processor: the model's.
        recipe: the run's; `export.dtype` is the type of the written floating-point weights.
        provenance: name -> plain value.
        class_names: what training of segmentation showed, for the card.
        data: how much it was, for the card.
    """
    dtype = getattr(torch, recipe.export.dtype)
    converted = {
        name: value.to(dtype) if value.is_floating_point() and not model.stays_in_float32(name) else value
        for name, value in weights.items()
    }
    provenance = {**provenance, "command": public_command(provenance.get("command", ""))}
    metadata = {"recipe_hash": recipe_hash(recipe), "seed": str(recipe.seed)}
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in provenance.items()}

    def write(partial: Path) -> None:
        before = model.config.dtype
        model.save_pretrained(partial, state_dict=converted)
        # save_pretrained notes the type the model has, not that of the weights it is given
        model.config.dtype = dtype
        model.config.save_pretrained(partial)
        model.config.dtype = before
        processor.save_pretrained(partial)
        for file in partial.glob("*.safetensors"):
            _add_metadata(file, metadata)
        name = public_name(folder.parent.resolve() if folder.name == "model" else folder.resolve())
        history = training_history(recipe, provenance, class_names, data)
        write_card(partial, model_name=name, history=history, entries=_results(partial, recipe, provenance, processor))

    atomic_folder(folder, write)


def training_history(
    recipe: Any, provenance: Mapping[str, Any], class_names: Sequence[str] = (), data: str | None = None
) -> History:
    """What a card says about a run; local paths are shortened to the folder's name.

    Args:
        recipe: a training recipe, of segmentation or of CLIP's adaptation.
        provenance: see [`export_model`]; command, steps, seed and commit are shown.
        class_names: see [`History`].
        data: how much it was.
    """
    model = recipe.model
    bases = [public_name(base) for base in (model.from_pretrained, model.from_clip, model.from_sam) if base]
    source = getattr(recipe.data, "name", None)  # adaptation has several sources
    sources = [public_name(name) for name in ([source] if source else recipe.data.sources)]
    settings = {
        "Steps": provenance.get("exported_step"),
        "Batch size": recipe.batch_size,
        "Trained parameters": provenance.get("trainable_parameters"),
        "Command": f"`{provenance['command']}`" if provenance.get("command") else None,
        "Recipe (hash)": recipe_hash(recipe),
        "Seed": recipe.seed,
        "Commit": provenance.get("commit"),
    }
    named = ", ".join(sources)
    return History(
        kind="trained",
        base_models=bases,
        training_data=f"{named} ({data})" if data else named,
        dataset_id=next((name for name in sources if is_hub_id(name)), None),
        class_names=class_names,
        settings={name: value for name, value in settings.items() if value is not None},
    )


def _results(folder: Path, recipe: Any, provenance: Mapping[str, Any], processor: Any) -> list[ledger.Entry]:
    """The evaluation of the exported weights as a ledger of one line, written into their folder; none: no line."""
    figures = finite_figures({name: value for name, value in provenance.items() if name != "seconds"})
    if not any(name in METRICS for name in figures):
        return []
    evaluated = recipe.evaluation.data or recipe.data
    split = evaluated.eval_split or "held out"
    limit = recipe.evaluation.max_samples
    size = processor.image_processor.size
    protocol = [
        f"{public_name(evaluated.name)} {split}",
        *([f"first {limit} pictures"] if limit is not None else []),
        ", ".join(f"{name} {value}" for name, value in dict(size).items() if value is not None),
        f"IoU averaged over {recipe.evaluation.averaging} classes",
    ]
    entry = ledger.append(
        folder / RESULTS_FILE,
        command=provenance.get("command", ""),
        seed=recipe.seed,
        seconds=provenance.get("seconds", 0.0),
        figures=figures,
        protocol="; ".join(protocol),
        code={name: provenance.get(name) for name in ("commit", "dirty")},
        method=read_config(folder)[1].model_type,
        dataset=public_name(evaluated.name),
        split=split,
        recipe_hash=recipe_hash(recipe),
        weights=saved_weights_digest(folder),
    )
    return [entry]


def _add_metadata(file: Path, metadata: dict[str, str]) -> None:
    with safe_open(file, framework="pt") as opened:
        present = opened.metadata() or {}
    save_file(load_file(file), file, metadata={**present, **metadata})
