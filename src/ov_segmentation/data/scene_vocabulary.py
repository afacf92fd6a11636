"""Names of the synthetic scenes: things are (colour, pattern, shape), stuff is (colour, texture), in three tiers.

A name is a composition of attribute words, so a model can be asked for compositions it never met. The tiers say who has
met a class: `a` captions and segmentation training, `b` captions only (as most "unseen" classes of real benchmarks,
which CLIP's training has seen), `c` neither.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

TIERS = ("a", "b", "c")

THING_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
THING_PATTERNS = ("plain", "striped", "dotted", "checkered", "netted")
THING_SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "bar")
STUFF_COLOURS = ("green", "blue", "brown", "gray", "purple", "pink")
STUFF_TEXTURES = ("grainy", "wavy", "cloudy", "tiled", "speckled")
STUFF_NOUN = "ground"


@dataclass(frozen=True)
class SceneVocabulary:
    """The classes of the scenes. Class index = position in `names`: all things first, then all stuff.

    Args:
        colours, patterns, shapes: attribute words of things, subsets of the module's tuples.
        stuff_colours, stuff_textures: attribute words of stuff.
        held_out_things: number of things in tier b and, again, in tier c.
        held_out_stuff: the same for stuff.
        split_seed: seed of the choice of held-out compositions.

    Raises:
        ValueError: for an unknown attribute word, or a hold-out so large that an attribute pair would leave tier a.
    """

    colours: tuple[str, ...]
    patterns: tuple[str, ...]
    shapes: tuple[str, ...]
    stuff_colours: tuple[str, ...] = STUFF_COLOURS
    stuff_textures: tuple[str, ...] = STUFF_TEXTURES
    held_out_things: int = 0
    held_out_stuff: int = 0
    split_seed: int = 0

    def __post_init__(self) -> None:
        known = {
            "colours": THING_COLOURS,
            "patterns": THING_PATTERNS,
            "shapes": THING_SHAPES,
            "stuff_colours": STUFF_COLOURS,
            "stuff_textures": STUFF_TEXTURES,
        }
        for field, words in known.items():
            unknown = [word for word in getattr(self, field) if word not in words]
            if unknown:
                raise ValueError(f"{field} holds {unknown}, which the generator cannot draw; it knows {list(words)}.")
        _ = self.tiers  # an impossible hold-out is an error here and not in the middle of a run

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what is cached, so that a data set's fingerprint does not depend on what was looked at before.
        return type(self), tuple(getattr(self, item.name) for item in fields(self))

    @classmethod
    def small(cls) -> SceneVocabulary:
        """The project's default: 6 x 4 x 5 = 120 things (76 / 22 / 22 in tiers a / b / c), 30 stuff (22 / 4 / 4)."""
        return cls(
            colours=("red", "orange", "yellow", "green", "blue", "purple"),
            patterns=("plain", "striped", "dotted", "checkered"),
            shapes=("circle", "star", "cross", "ring", "bar"),
            held_out_things=22,
            held_out_stuff=4,
        )

    @classmethod
    def full(cls) -> SceneVocabulary:
        """8 x 5 x 8 = 320 things (200 / 60 / 60 in tiers a / b / c) and 30 stuff (22 / 4 / 4)."""
        return cls(THING_COLOURS, THING_PATTERNS, THING_SHAPES, held_out_things=60, held_out_stuff=4)

    @classmethod
    def by_name(cls, name: str) -> SceneVocabulary:
        """`"small"` or `"full"`."""
        if name not in ("small", "full"):
            raise ValueError(f"Unknown scene vocabulary {name!r}: choose 'small' or 'full'.")
        return cls.small() if name == "small" else cls.full()

    @cached_property
    def thing_attributes(self) -> tuple[tuple[int, int, int], ...]:
        """(colour, pattern, shape) of every thing, as indices into this vocabulary's words."""
        return tuple(itertools.product(range(len(self.colours)), range(len(self.patterns)), range(len(self.shapes))))

    @cached_property
    def stuff_attributes(self) -> tuple[tuple[int, int], ...]:
        """(colour, texture) of every stuff class, as indices into this vocabulary's words."""
        return tuple(itertools.product(range(len(self.stuff_colours)), range(len(self.stuff_textures))))

    @cached_property
    def things(self) -> tuple[str, ...]:
        """Names such as "red striped circle"."""
        return tuple(f"{self.colours[c]} {self.patterns[p]} {self.shapes[s]}" for c, p, s in self.thing_attributes)

    @cached_property
    def stuff(self) -> tuple[str, ...]:
        """Names such as "green grainy ground"."""
        return tuple(f"{self.stuff_colours[c]} {self.stuff_textures[t]} {STUFF_NOUN}" for c, t in self.stuff_attributes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All class names; the index is the class index of the label maps."""
        return self.things + self.stuff

    @property
    def num_things(self) -> int:
        """Number of things; classes from this index on are stuff."""
        return len(self.thing_attributes)

    @cached_property
    def tiers(self) -> tuple[str, ...]:
        """Tier ("a", "b" or "c") of every class, in the order of `names`."""
        thing_tiers = _hold_out(self.thing_attributes, self.held_out_things, self.split_seed)
        stuff_tiers = _hold_out(self.stuff_attributes, self.held_out_stuff, self.split_seed)
        return tuple(thing_tiers + stuff_tiers)

    def classes_of(self, tiers: Iterable[str], kind: str = "all") -> list[int]:
        """Indices of the classes of some tiers, ascending.

        Args:
            tiers: e.g. `("a", "b")`.
            kind: "things", "stuff" or "all".
        """
        wanted = list(tiers)
        unknown = [tier for tier in wanted if tier not in TIERS]
        if unknown or not wanted:
            raise ValueError(f"tiers={wanted}: give one or more of {list(TIERS)}.")
        ranges = {
            "things": range(self.num_things),
            "stuff": range(self.num_things, len(self.names)),
            "all": range(len(self.names)),
        }
        if kind not in ranges:
            raise ValueError(f"kind={kind!r}: choose 'things', 'stuff' or 'all'.")
        return [index for index in ranges[kind] if self.tiers[index] in wanted]


def _hold_out(attributes: Sequence[tuple[int, ...]], count: int, seed: int) -> list[str]:
    """Tiers of compositions: `count` in b, `count` in c, the rest in a, where what a model composes from stays visible.

    Of things every attribute PAIR (colour x pattern, pattern x shape, colour x shape) keeps at least two members in
    tier a; of stuff, which is a pair itself, every single attribute keeps at least half of its members. Greedy over a
    shuffled order, b and c in turn; a few orders are tried.
    """
    arity = len(attributes[0])
    subsets = list(itertools.combinations(range(arity), arity - 1))
    members = Counter((dims, tuple(item[d] for d in dims)) for item in attributes for dims in subsets)
    floor = {key: 2 if arity == 3 else (number + 1) // 2 for key, number in members.items()}
    generator = random.Random(seed)
    for _ in range(200):
        left = dict(members)
        held: list[tuple[int, ...]] = []
        for item in generator.sample(list(attributes), len(attributes)):
            keys = [(dims, tuple(item[d] for d in dims)) for dims in subsets]
            if len(held) < 2 * count and all(left[key] > floor[key] for key in keys):
                held.append(item)
                for key in keys:
                    left[key] -= 1
        if len(held) == 2 * count:
            tier_of = {item: "bc"[position % 2] for position, item in enumerate(held)}
            return [tier_of.get(item, "a") for item in attributes]
    raise ValueError(
        f"Cannot hold out 2 x {count} of {len(attributes)} compositions and keep every attribute pair in tier a: "
        "hold out fewer, or use more words."
    )
