"""Blocks used by more than one method."""
