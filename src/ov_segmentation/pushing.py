"""`push_to_hub` of models, processors and pipelines."""

from __future__ import annotations

from typing import Any


class PushToHub:
    """Transformers' `push_to_hub`, with the card of this package in place of transformers' empty one."""

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Save and upload in one commit.

        A model or pipeline brings a card, unless the repository has one that somebody wrote or edited; a processor
        brings none.

        Args:
            repo_id: "OWNER/NAME", made if it is not there.
            options: transformers': commit_message, commit_description, private, token, revision, create_pr,
                max_shard_size, tags.

        Returns:
            The commit (`huggingface_hub.CommitInfo`).

        Raises:
            HubError: the Hub's refusal; says what to do.
        """
        from .hub import push_saved  # only who pushes pays for its import

        return push_saved(self, repo_id, **options)
