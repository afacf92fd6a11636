"""The suite. Shared mixins are imported as `tests.<module>` from the project's root."""
