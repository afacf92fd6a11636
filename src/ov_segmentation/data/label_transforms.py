"""From the ids in an official label file to class ids: one table a data set, in which every legal id stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelTransform:
    """Which id of an official label file is which class. An id that is neither a class nor ignored is an error.

    Args:
        classes: the file's id of class 0, 1, ...; two ids that make one class stand in one tuple.
        ignored: the file's ids that are not scored.
        ignore_index: what is written for them: 255, or 65535 where the classes need 16 bits.
    """

    classes: tuple[int | tuple[int, ...], ...]
    ignored: frozenset[int]
    ignore_index: int = 255

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """8 or 16 bits."""
        return np.uint8 if self.ignore_index <= 255 else np.uint16

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """The class ids `[H, W]` of a file's ids `[H, W]`.

        Raises:
            ValueError: ids that the data set does not have.
        """
        table = self._table()
        found = np.unique(ids)
        known = (found >= 0) & (found < len(table))
        known[known] = table[found[known]] >= 0
        if not known.all():
            wrong = found[~known].tolist()
            raise ValueError(
                f"it holds the label ids {wrong[:5]}{' and others' if len(wrong) > 5 else ''}, which this data set "
                f"does not have: is it a label map of another data set?"
            )
        return table[ids].astype(self.dtype)

    def _table(self) -> np.ndarray:
        """`[highest legal id + 1]`, -1 where an id is not legal."""
        per_class = [ids if isinstance(ids, tuple) else (ids,) for ids in self.classes]
        table = np.full(max([*self.ignored, *(i for ids in per_class for i in ids)]) + 1, -1, dtype=np.int64)
        table[sorted(self.ignored)] = self.ignore_index
        for label, ids in enumerate(per_class):
            table[list(ids)] = label
        return table


def keep_classes(transform: LabelTransform, kept: Iterable[int]) -> LabelTransform:
    """The same with only some of the classes, renumbered in their order; the others are ignored (zero-shot splits)."""
    kept = list(kept)
    dropped = [ids for label, ids in enumerate(transform.classes) if label not in kept]
    ignored = {i for ids in dropped for i in (ids if isinstance(ids, tuple) else (ids,))}
    return LabelTransform(
        tuple(transform.classes[label] for label in kept), transform.ignored | ignored, transform.ignore_index
    )
