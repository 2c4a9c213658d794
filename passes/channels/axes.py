"""Which channels lie along an axis, and which axes must keep one order: union-find over segments of channels.

An axis is a row of parts, each a segment whose channels lie `repeat` places apart: of [N, C, H, W] flattened to
[N, C·H·W] the second axis is the segment C with repeat H·W, of two tensors concatenated it is two segments. Axes that
are tied share their segments. A segment is one channel after the other until something asks for less; then it is cut
in two, or its channels are taken together, for all axes it lies on at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import lcm, prod
from typing import NamedTuple, TypeAlias


class Segment:
    """Channels that share one order wherever they occur.

    Attributes:
        size: the number of channels; None where it is unknown, and the segment then frozen.
        frozen: whether the order must stay as it is.
        whole: whether no channel can be left out, because something works across all of them or needs their number.
        why: what froze it or needs it whole, in words; "" as long as nobody said.
        parts: what has taken the segment's place; empty while it stands for itself.
    """

    __slots__ = ("frozen", "parts", "size", "whole", "why")

    def __init__(self, size: int | None, frozen: bool = False) -> None:
        self.size = size
        self.frozen = frozen
        self.whole = False
        self.why = ""
        self.parts: tuple[Part, ...] = ()

    def piece(self, size: int) -> Segment:
        """A segment of some of these channels, bound as they are."""
        made = Segment(size, self.frozen)
        made.whole, made.why = self.whole, self.why
        return made

    def bind(self, other: Segment) -> None:
        """Take over what binds another."""
        self.frozen |= other.frozen
        self.whole |= other.whole
        self.why = self.why or other.why


class Part(NamedTuple):
    """A segment on an axis: channel c at the places c · repeat .. (c + 1) · repeat - 1 from where the part begins."""

    segment: Segment
    repeat: int


Axis: TypeAlias = tuple[Part, ...]


def fixed(size: int | None) -> Axis:
    """An axis whose order cannot change."""
    return (Part(Segment(size, frozen=True), 1),)


def free(size: int) -> Axis:
    """An axis in an order of its own."""
    return (Part(Segment(size, frozen=size < 2), 1),)


def leaves(axis: Iterable[Part]) -> Axis:
    """The axis as the segments that stand for themselves today."""
    result = []
    pending = list(axis)[::-1]
    while pending:
        segment, repeat = pending.pop()
        if segment.parts:
            pending.extend(Part(inner, times * repeat) for inner, times in reversed(segment.parts))
        else:
            result.append(Part(segment, repeat))
    return tuple(result)


def extent(axis: Iterable[Part]) -> int | None:
    """Places along the axis, or None."""
    total = 0
    for segment, repeat in leaves(axis):
        if segment.size is None:
            return None
        total += segment.size * repeat
    return total


def freeze(*axes: Iterable[Part]) -> None:
    """Keep the order of everything along these axes."""
    for axis in axes:
        for segment, _ in leaves(axis):
            segment.frozen = True


def keep_whole(*axes: Iterable[Part]) -> None:
    """Keep every channel along these axes."""
    for axis in axes:
        for segment, _ in leaves(axis):
            segment.whole = True


def explain(words: str, *axes: Iterable[Part]) -> None:
    """Say what binds the channels along these axes that are bound, or but one, and of which nothing is said yet."""
    for axis in axes:
        for segment, _ in leaves(axis):
            if segment.frozen or segment.whole or segment.size == 1:
                segment.why = segment.why or words


def repeated(axis: Axis, times: int) -> Axis:
    """Every place of the axis as so many neighbouring ones."""
    return tuple(Part(segment, repeat * times) for segment, repeat in axis)


def tie(one: Axis, other: Axis) -> None:
    """Give two axes the same order; where nothing but the order they have will do, freeze them."""
    if extent(one) is None or extent(one) != extent(other):
        freeze(one, other)
        return
    left, right = list(one)[::-1], list(other)[::-1]
    while left:
        (a, a_repeat), (b, b_repeat) = _top(left), _top(right)
        assert a.size is not None and b.size is not None, "extent looked"
        common = min(a.size * a_repeat, b.size * b_repeat)
        step = lcm(a_repeat, b_repeat)
        if common % step:
            freeze(left, right)
            return
        if a.size * a_repeat > common:
            _cut(a, common // a_repeat)
        elif b.size * b_repeat > common:
            _cut(b, common // b_repeat)
        elif a_repeat < step:
            _take_together(a, step // a_repeat)
        elif b_repeat < step:
            _take_together(b, step // b_repeat)
        else:
            left.pop(), right.pop()
            if a is not b:
                a.bind(b)
                b.parts = (Part(a, 1),)


def cut(axis: Axis, start: int, stop: int) -> Axis:
    """The places `start` to `stop` of an axis of known extent; frozen where a channel would be cut through."""
    taken: list[Part] = []
    for edge in (start, stop):
        begin = 0
        for segment, repeat in leaves(axis):
            assert segment.size is not None, "the extent is known"
            inside, rest = divmod(edge - begin, repeat)
            if 0 < edge - begin < segment.size * repeat:
                if rest:
                    freeze(axis)
                    return fixed(stop - start)
                _cut(segment, inside)
            begin += segment.size * repeat
    begin = 0
    for part in leaves(axis):
        if start <= begin < stop:
            taken.append(part)
        assert part.segment.size is not None
        begin += part.segment.size * part.repeat
    return tuple(taken) or fixed(0)


def merge(axes: Sequence[Axis]) -> Axis:
    """Neighbouring axes as one, in C order: [C, H, W] -> [C·H·W]."""
    if len(axes) == 1:
        return axes[0]
    merged = reshape(axes, [_product([extent(axis) for axis in axes])])[0]
    # What is frozen keeps the reason, that of the longest axis first.
    for axis in sorted(axes, key=lambda axis: extent(axis) or 0, reverse=True):
        for segment, _ in leaves(axis):
            if segment.why:
                explain(segment.why, merged)
    return merged


def reshape(axes: Sequence[Axis], sizes: Sequence[int | None]) -> list[Axis]:
    """The axes of the same elements in another shape; whatever is not provably kept whole is frozen.

    An axis of n places, s elements apart, lies whole on one of m places, t elements apart, where t | s and n·s | m·t:
    each place s/t times, and the whole m·t / (n·s) times over. Where s | t and n·s = m·t it is the first of the axes
    that it is split into, and t/s of its places move as one.
    """
    result = [fixed(size) for size in sizes]
    found: dict[int, list[int]] = {}
    moved: dict[int, Axis] = {}
    for i, axis in enumerate(axes):
        homes = [] if _is_frozen(axis) else [(j, new) for j in range(len(sizes)) if (new := _moved(axes, sizes, i, j))]
        if len(homes) == 1:
            found.setdefault(homes[0][0], []).append(i)
            moved[i] = homes[0][1]
        else:
            freeze(axis)
    for j, sources in found.items():
        largest = max(sources, key=lambda i: extent(axes[i]) or 0)
        result[j] = moved[largest]
        freeze(*(axes[i] for i in sources if i != largest))
    return result


# Copies of an axis along another; more are not worth their parts.
_MOST_COPIES = 1024


def _moved(axes: Sequence[Axis], sizes: Sequence[int | None], i: int, j: int) -> Axis:
    """Axis `i` as it lies on the new axis `j`; () where it does not provably lie on it whole."""
    n, s = extent(axes[i]), _product([extent(axis) for axis in axes[i + 1 :]])
    m, t = sizes[j], _product(sizes[j + 1 :])
    if not (n and s and m and t) or m == 1 or m * t % (n * s):
        return ()
    copies = m * t // (n * s)
    if s % t == 0 and copies <= _MOST_COPIES:
        return repeated(axes[i], s // t) * copies
    if t % s == 0 and copies == 1 and _has_repeats(axes[i], t // s):
        return tuple(Part(segment, repeat // (t // s)) for segment, repeat in leaves(axes[i]))
    return ()


def _has_repeats(axis: Axis, times: int) -> bool:
    """Whether every channel has a multiple of `times` places, once channels are taken together for that."""
    while odd := [part for part in leaves(axis) if part.repeat % times]:
        segment, repeat = odd[0]
        count = lcm(repeat, times) // repeat
        if segment.size is None or segment.size % count:
            return False
        _take_together(segment, count)
    return True


def _product(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return prod(known) if len(known) == len(sizes) else None


def _is_frozen(axis: Axis) -> bool:
    return all(segment.frozen for segment, _ in leaves(axis))


def _top(stack: list[Part]) -> Part:
    """The last part, once it stands for itself."""
    while stack[-1].segment.parts:
        segment, repeat = stack.pop()
        stack.extend(Part(inner, times * repeat) for inner, times in reversed(segment.parts))
    return stack[-1]


def _cut(segment: Segment, at: int) -> None:
    """Two orders, one of the first `at` channels and one of the others."""
    assert segment.size is not None
    sizes = (at, segment.size - at)
    segment.parts = tuple(Part(segment.piece(size), 1) for size in sizes)


def _take_together(segment: Segment, count: int) -> None:
    """`count` neighbouring channels as one."""
    assert segment.size is not None
    segment.parts = (Part(segment.piece(segment.size // count), count),)
