"""The card of a checkpoint: `cards/checkpoint.md`, filled from what the checkpoint's folder holds.

A card that was made here says so in its header, with a digest of itself: as long as it is unchanged it may be made
anew, and once somebody has edited it, it is theirs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from .auto import METHODS, Method, load_class
from .checkpoint_results import (
    METRICS,
    dataset_of,
    eval_results,
    measured_figures,
    newest,
    saved_weights_digest,
    weights_files,
)
from .ledger import Entry
from .method_facts import CARDS, FACTS, closing_sections, markdown_table, paper_table

CARD = "README.md"
HEADER = "ov_segmentation"
TEMPLATE = CARDS / "checkpoint.md"
LIBRARY = "ov_segmentation"
PIPELINE_TAG = "image-segmentation"  # the Hub has no tag for open vocabularies
TAGS = ("open-vocabulary-segmentation", "semantic-segmentation", "clip")
SHOWN_NAMES = 200
# what the Hub knows by itself; any other licence is "other" with a name there
_LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0
cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
cc-by-sa-3.0 cc-by-sa-4.0 epl-2.0 eupl-1.2 gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 odbl openrail
openrail++ unknown unlicense wtfpl zlib
"""
HUB_LICENCES = frozenset(_LICENCES.split())


class CardError(ValueError):
    """A folder that no card can be written for; the message says what it lacks."""


@dataclass(frozen=True)
class History:
    """Where weights come from; kept in the card's header, so that a card can be made anew.

    Args:
        kind: trained by this package, or converted from an original checkpoint.
        base_models: pretrained models it started from: Hub ids, or names of local folders.
        training_data: name of the data, and how much of it.
        dataset_id: its Hub id, where it has one.
        class_names: names that training showed.
        settings: further rows: name -> value.
    """

    kind: Literal["trained", "converted"]
    base_models: Sequence[str] = ()
    training_data: str | None = None
    dataset_id: str | None = None
    class_names: Sequence[str] = ()
    settings: Mapping[str, str | int | float] = field(default_factory=dict)

    def header(self) -> dict[str, Any]:
        """Plain values for the card's header, what is empty left out."""
        values = {key: value for key, value in asdict(self).items() if value}
        return {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in values.items()}


def public_name(source: str | Path) -> str:
    """A Hub id as it is; of a local path the folder's name alone: a card says nothing about somebody's disk."""
    path = Path(source)
    if path.exists() or path.is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        named = [part for part in path.parts if part not in (".", "..", "/", "~", "model")]
        return named[-1] if named else "model"
    return str(source)


def public_command(command: str) -> str:
    """A shell command with the absolute paths in it shortened as `public_name` does."""

    def shortened(word: re.Match[str]) -> str:
        return re.sub(r"""(?<![^='"])[/~][^'"]*""", lambda path: public_name(path[0]), word[0])

    return re.sub(r"'[^']*'|[^\s']+", shortened, command)


def is_hub_id(name: str) -> bool:
    """Whether a `public_name` is a Hub id."""
    return "/" in name


def build_card(
    folder: Path,
    *,
    model_name: str | None = None,
    repo_id: str | None = None,
    history: History | None = None,
    entries: Sequence[Entry] = (),
    weights_license: str | None = None,
    extra_tags: Sequence[str] = (),
) -> ModelCard:
    """The card of the checkpoint in a folder.

    Args:
        folder: model and processor, as `save_pretrained` writes them.
        model_name: default: the repository's or the folder's name.
        repo_id: where it is going to lie, for the snippet.
        history: where the weights come from; default: what the folder's present card says.
        entries: the ledger's lines that belong to it, see `checkpoint_results`.
        weights_license: default: the configuration's.
        extra_tags: beside the package's.

    Raises:
        CardError: the folder holds no checkpoint of this package.
    """
    config, method = read_config(folder)
    digest = saved_weights_digest(folder)
    history = history or recorded_history(folder, digest)
    facts = FACTS[method.model_type]
    licence = weights_license or config.get("weights_license")
    model_name = model_name or public_name(repo_id or folder.resolve()).rpartition("/")[2]
    entries = newest(entries)
    base_models = list(history.base_models) if history else []
    data = ModelCardData(
        **_licence_fields(licence),
        library_name=LIBRARY,
        pipeline_tag=PIPELINE_TAG,
        tags=[*TAGS, *extra_tags],
        base_model=[name for name in base_models if is_hub_id(name)] or None,
        datasets=[history.dataset_id] if history and history.dataset_id else None,
        model_name=model_name,
        eval_results=eval_results(entries) or None,
        **{HEADER: {"weights": digest, **({"history": history.header()} if history else {})}},
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        source=repo_id or "path-or-hub-id",
        facts=facts,
        parameters=f"{_parameters(folder):,}",
        reimplementation=method.model_type == "esc_net",
        licence=_licence_text(licence, facts.licence),
        vocabulary=_vocabulary(folder, method, history),
        history=_history_text(history, method.model_type),
        results=_results_table(entries),
        paper_table=paper_table(method.model_type),
        closing=closing_sections(method.model_type),
    )
    if data.eval_results is None:
        card.data.model_name = None  # it only belongs to a model-index
    card.data[HEADER]["digest"] = _digest(card)
    return ModelCard(card.content)


def is_generated(text: str) -> bool:
    """Whether a card was made here and nobody has changed it since."""
    card = ModelCard(text, ignore_metadata_errors=True)
    header = card.data.get(HEADER)
    return isinstance(header, dict) and header.get("digest") == _digest(card)


def write_card(folder: Path, **facts: Any) -> bool:
    """Write `README.md` into a checkpoint's folder, unless there is one that somebody wrote or edited.

    Args:
        facts: as for [`build_card`].

    Returns:
        Whether it was written.
    """
    file = folder / CARD
    if file.is_file() and not is_generated(file.read_text(encoding="utf-8")):
        return False
    build_card(folder, **facts).save(file)
    return True


def read_config(folder: Path) -> tuple[dict[str, Any], Method]:
    """`config.json` of a checkpoint, and its method; CardError where it is none of this package."""
    file = folder / "config.json"
    if not file.is_file():
        raise CardError(f"{folder} holds no config.json: it is no checkpoint. Save a model there with save_pretrained.")
    config = json.loads(file.read_text(encoding="utf-8"))
    for method in METHODS:
        if method.model_type == config.get("model_type"):
            return config, method
    known = ", ".join(method.model_type for method in METHODS)
    raise CardError(f"{folder} is a checkpoint of model type {config.get('model_type')!r}; this package has {known}.")


def recorded_history(folder: Path, digest: str) -> History | None:
    """What a folder's card says about where the weights come from, if it was written for weights with this digest."""
    file = folder / CARD
    if not file.is_file():
        return None
    header = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get(HEADER)
    history = header.get("history") if isinstance(header, dict) and header.get("weights") == digest else None
    return History(**history) if isinstance(history, dict) else None


def _digest(card: ModelCard) -> str:
    data = card.data.to_dict()
    header = data.get(HEADER)
    if isinstance(header, dict):
        data[HEADER] = {key: value for key, value in header.items() if key != "digest"}
    text = "\n".join(line.rstrip() for line in card.text.strip().splitlines())
    return hashlib.sha256(f"{json.dumps(data, sort_keys=True, default=str)}\n{text}".encode()).hexdigest()[:16]


def _parameters(folder: Path) -> int:
    total = 0
    for file in weights_files(folder):
        with safe_open(file, framework="pt") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


def _licence_fields(licence: str | None) -> dict[str, str]:
    if licence is None:
        return {}
    if licence in HUB_LICENCES:
        return {"license": licence}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", licence.lower()).strip("-")}


def _licence_text(licence: str | None, original: str) -> str:
    if licence is None:
        return (
            f"not stated. Whoever publishes them should say it, in `config.weights_license`, with regard to what they "
            f"were made from. The original's: {original}."
        )
    return f"`{licence}`{', not for commercial use' if '-nc' in licence.lower() else ''}. The original's: {original}."


def _vocabulary(folder: Path, method: Method, history: History | None) -> str:
    sentences = []
    file = folder / "processor_config.json"
    if file.is_file():
        templates = json.loads(file.read_text(encoding="utf-8")).get("prompt_templates") or []
        if templates == ["{}"]:
            sentences.append("They are encoded as they are, without a template.")
        elif templates:
            several = f"{len(templates)} templates, the first of them" if len(templates) > 1 else "one template,"
            sentences.append(f'Each goes into {several} "{templates[0]}".')
    rule = load_class(method.processor).comma_rule
    sentences.append(
        {
            "keep": "A comma inside a name is part of it.",
            "split": "A name with commas is a class with synonyms.",
            "first": "Of a name with commas, the part before the first comma counts.",
        }[rule]
    )
    sentences.append("A list of names is a class with synonyms, whose embeddings are averaged.")
    if names := history.class_names if history else ():
        shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
        sentences.append(f"\n\nTraining of segmentation showed {len(names)} names: {shown}.")
    return " ".join(sentences).replace(" \n", "\n")


def _history_text(history: History | None, model_type: str) -> str:
    facts = FACTS[model_type]
    authors = f"{facts.title}'s authors trained on {facts.training_data}, starting from {facts.base_models}."
    if history is None:
        return f"Not recorded. {authors}"
    if history.kind == "converted":
        rows = dict(history.settings)
        opening = f"Converted from the authors' checkpoint with `conversion/convert_{model_type}.py`. {authors}"
    else:
        started = ", ".join(f"`{name}`" for name in history.base_models) or "none: from random weights"
        rows = {"Base models": started, "Training data": history.training_data or "not recorded", **history.settings}
        opening = "Trained with `ov_segmentation`."
    if not rows:
        return opening
    return f"{opening}\n\n{markdown_table(['', ''], [[name, str(value)] for name, value in rows.items()])}"


def _results_table(entries: Sequence[Entry]) -> str:
    rows = []
    for entry in entries:
        figures = measured_figures(entry)
        if figures:
            dataset, split = dataset_of(entry)
            shown = "; ".join(f"{METRICS[name][1]} {100 * value:.1f} %" for name, value in figures.items())
            commit = entry.get("commit")
            rows.append(
                [
                    dataset if split is None else f"{dataset}, {split}",
                    shown,
                    str(entry.get("protocol") or "-"),
                    f"`{entry['command']}`" if entry.get("command") else "-",
                    f"`{commit[:8]}`" if commit else "-",
                ]
            )
    return markdown_table(["Data", "Figures", "Protocol", "Command", "Commit"], rows) if rows else ""
