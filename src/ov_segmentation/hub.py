"""Checkpoints and data sets to the Hub: model, processor, card and results in one commit."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that the client uses, whose name differs between versions
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .checkpoint_results import RESULTS_FILE, results_of, saved_weights_digest
from .model_card import (
    CARD,
    CardError,
    History,
    build_card,
    is_generated,
    public_command,
    read_config,
    recorded_history,
)

RepoType = Literal["model", "dataset"]
MODEL_FOLDER = "model"
"""Where a training run's folder holds its checkpoint."""
PROCESSOR_FILES = ("processor_config.json", "tokenizer.json")
WEIGHTS_SUFFIXES = (".safetensors", ".safetensors.index.json")


class HubError(RuntimeError):
    """Something that cannot be pushed, or a Hub that does not take it; the message says what to do."""


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Args:
        url: of the commit.
        commit: its name.
        files: that it holds.
        card: "written" (made from the checkpoint), "given" (the folder's own README.md), or "kept" (somebody's card on
            the Hub stays as it is).
        results: how many measurements the card and `results.jsonl` have.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    card: Literal["written", "given", "kept"]
    results: int


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    ledgers: Sequence[str | Path] = (),
    name: str | None = None,
    weights_license: str | None = None,
    overwrite_card: bool = False,
) -> Pushed:
    """Push a checkpoint's folder, with its card and results, in one commit.

    A card that somebody wrote or edited is not replaced: the folder's goes up as it is, and the one on the Hub stays.
    Weights that the repository holds under other names (shards of an earlier push) are removed in the same commit.

    Args:
        folder: what `save_pretrained` of model and processor wrote, or the folder of a training run.
        repo_id: "OWNER/NAME", made if it is not there.
        private: of a repository that is made: whether it is private; None: as the account has it.
        token: default: the one of `hf auth login` or HF_TOKEN.
        revision: a branch, made if it is not there.
        create_pr: open a pull request.
        message: of the commit.
        ledgers: files of `results/*.jsonl` with measurements of this checkpoint.
        name: what lines there call it, when they do not hold its weights' digest or recipe.
        weights_license: licence of the weights, in card and configuration; default: the configuration's.
        overwrite_card: replace cards all the same.

    Raises:
        HubError: an incomplete folder, no measurement in a ledger, or the Hub's refusal; nothing is half committed.
    """
    folder = checkpoint_folder(Path(folder))
    try:
        _, method = read_config(folder)
        lines = results_of(folder, [Path(path) for path in ledgers], method.model_type, name)
    except (CardError, LookupError, FileNotFoundError, ValueError) as error:
        raise HubError(str(error)) from error
    # commands, and names of checkpoints that have no other, hold paths of the disk that a ledger lies on
    entries = [{key: public_command(it) if isinstance(it, str) else it for key, it in line.items()} for line in lines]
    files = {path: folder / path for path in _checkpoint_files(folder)}
    own_card = folder / CARD if CARD in files else None
    if own_card is not None and (overwrite_card or is_generated(own_card.read_text(encoding="utf-8"))):
        own_card = None
    contents: dict[str, Path | bytes] = {**files}
    if entries:
        contents[RESULTS_FILE] = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    if weights_license is not None:
        config = json.loads(files["config.json"].read_text(encoding="utf-8"))
        config["weights_license"] = weights_license
        contents["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    api = HfApi(token=token)
    with explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        keeps_remote_card = own_card is None and not overwrite_card and _has_own_card(api, repo_id, revision)
        if keeps_remote_card:
            contents.pop(CARD, None)
        elif own_card is None:
            card = build_card(folder, repo_id=repo_id, entries=entries, weights_license=weights_license)
            contents[CARD] = card.content.encode()
        info = commit_files(
            api,
            repo_id,
            contents,
            message=message or f"{method.model}: model, processor, card and results",
            revision=revision,
            create_pr=create_pr,
        )
    card_state = "kept" if keeps_remote_card else "written" if own_card is None else "given"
    return Pushed(info.commit_url, info.oid, tuple(sorted(contents)), card_state, len(entries))


def push_folder(folder: str | Path, repo_id: str, *, repo_type: RepoType, private: bool | None = None) -> CommitInfo:
    """Push a folder as it is; one that is too large for one commit goes in several.

    Raises:
        HubError: the Hub's refusal.
    """
    api = HfApi()
    with explained(repo_id):
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=repo_id, repo_type=repo_type, folder_path=folder)


def checkpoint_folder(folder: Path) -> Path:
    """The folder with the checkpoint: the one given, or that of the training run given."""
    if not folder.is_dir():
        raise HubError(f"There is no folder {folder}.")
    inside = folder / MODEL_FOLDER
    return inside if not (folder / "config.json").is_file() and (inside / "config.json").is_file() else folder


def commit_files(
    api: HfApi,
    repo_id: str,
    contents: dict[str, Path | bytes],
    *,
    message: str,
    description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """One commit with these files (path in the repository -> file or content); other weights there are removed."""
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    additions = [CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
    present = api.list_repo_files(repo_id, revision=revision)
    stale = [path for path in present if path.endswith(WEIGHTS_SUFFIXES) and "/" not in path and path not in contents]
    removed = stale if any(path.endswith(WEIGHTS_SUFFIXES) for path in contents) else []
    # not upload_folder: with hf_xet it may make several commits, between which the repository would not load
    return api.create_commit(
        repo_id,
        operations=[*additions, *(CommitOperationDelete(path) for path in removed)],
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
    )


def push_saved(
    saved: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Save and upload in one commit what has a `save_pretrained`; the options are those of transformers' `push_to_hub`.

    What writes a `config.json` brings a card, unless the repository has one that somebody wrote or edited.

    Raises:
        HubError: the Hub's refusal; says what to do.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary, explained(repo_id):
        folder = Path(temporary)
        saved.save_pretrained(folder, max_shard_size=max_shard_size)
        contents: dict[str, Path | bytes] = {path: folder / path for path in _files(folder)}
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if "config.json" in contents and not _has_own_card(api, repo_id, revision):
            card = build_card(folder, repo_id=repo_id, history=_history_at_source(saved, folder), extra_tags=tags or ())
            contents[CARD] = card.content.encode()
        return commit_files(
            api,
            repo_id,
            contents,
            message=commit_message or f"Upload {type(saved).__name__}",
            description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _history_at_source(saved: Any, folder: Path) -> History | None:
    """What the card of the local folder says that a model was loaded from, if the weights are still the same."""
    config = getattr(getattr(saved, "model", saved), "config", None)
    source = Path(getattr(config, "name_or_path", None) or "")
    return recorded_history(source, saved_weights_digest(folder)) if (source / CARD).is_file() else None


def _files(folder: Path) -> list[str]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _checkpoint_files(folder: Path) -> list[str]:
    files = _files(folder)
    missing = [name for name in PROCESSOR_FILES if name not in files]
    if missing:
        raise HubError(
            f"{folder} lacks {' and '.join(missing)}: a model without its processor cannot be used. Save the processor "
            f"there too: processor.save_pretrained({str(folder)!r})."
        )
    if not any(name.endswith(".safetensors") for name in files):
        raise HubError(f"{folder} holds no *.safetensors file: save the model there with save_pretrained.")
    return files


def _has_own_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repository has a card that somebody wrote or edited."""
    for place in dict.fromkeys((revision, None)):
        try:
            file = hf_hub_download(repo_id, CARD, revision=place, token=api.token)
        except RevisionNotFoundError:
            continue  # a branch that will be made begins as the main one
        except EntryNotFoundError:
            return False
        return not is_generated(Path(file).read_text(encoding="utf-8"))
    return False


@contextlib.contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turn the client's errors into `HubError`, whose message says what was asked for and what to do."""
    hub = constants.ENDPOINT
    log_in = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no repository id, which is written OWNER/NAME: {error}") from error
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it.") from error
    except LocalTokenNotFoundError as error:
        raise HubError(f"There is no token for {hub}. {log_in}") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{hub} has no repository {repo_id} that this token may see. {log_in}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = f"{hub} answers {status}: {error.server_message or error}"
        if status == 401:
            raise HubError(f"{said} {log_in}") from error
        if status == 403:
            raise HubError(
                f"{said} The token may not write to {repo_id}: choose an OWNER that it may write to, or another token."
            ) from error
        raise HubError(f"{repo_id} was not pushed. {said}") from error
    except HTTPError as error:
        raise HubError(
            f"{hub} cannot be reached or broke off ({type(error).__name__}: {error}). A commit is there whole or not "
            f"at all: start the same command again."
        ) from error
