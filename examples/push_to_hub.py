"""Push a checkpoint: `python examples/push_to_hub.py CHECKPOINT REPO_ID`.

Model, processor, card and results go in one commit. CHECKPOINT is a folder that `save_pretrained`, training or
conversion wrote, or a training run's. Its card is filled in here; one that you wrote or edited, in the folder or on the
Hub, stays. The card's `model-index` holds what was measured with these very weights: training's own evaluation, and
lines of the ledgers given by --results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ov_segmentation.hub import HubError, push_checkpoint

CARDS = {
    "written": "card written from the checkpoint",
    "given": "the folder's own README.md pushed as it is",
    "kept": "the repository's own README.md kept (--overwrite-card replaces it)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and push."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME, made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="made if it is not there (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--results", nargs="+", default=[], type=Path, metavar="FILE", help="ledgers (results/*.jsonl)")
    parser.add_argument("--name", help="what lines there that tell no weights or recipe call this checkpoint")
    parser.add_argument("--license", metavar="ID", help='of the weights ("mit", "cc-by-nc-4.0"), for card and config')
    parser.add_argument("--overwrite-card", action="store_true", help="replace a README.md that somebody wrote")
    options = parser.parse_args(arguments)
    try:
        pushed = push_checkpoint(
            options.checkpoint,
            options.repo_id,
            private=options.private,
            revision=options.revision,
            create_pr=options.create_pr,
            message=options.message,
            ledgers=options.results,
            name=options.name,
            weights_license=options.license,
            overwrite_card=options.overwrite_card,
        )
    except HubError as error:
        # the message says what to do; a traceback would bury it
        sys.exit(f"HubError: {error}")
    print(f"{pushed.url}\n{len(pushed.files)} files; {CARDS[pushed.card]}; {pushed.results} measurements")


if __name__ == "__main__":
    main()
