"""What the hop needs of a transfer engine, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from sglang_dualpath.errors import NotPushedError


class Descriptor(NamedTuple):
    """One contiguous copy: ``length`` bytes from local address ``source`` to the peer's address ``destination``."""

    source: int
    destination: int
    length: int


class PlaneGeometry(NamedTuple):
    """Slot ``k`` of this plane is ``page_bytes`` bytes at ``base + k * stride_bytes``.

    A page has one plane per contiguous piece: two (K and V) for MHA/GQA, one for MLA.
    """

    base: int
    stride_bytes: int
    page_bytes: int


class PoolGeometry(NamedTuple):
    """A host pool of ``slots`` pages, as far as a transfer engine sees it."""

    planes: tuple[PlaneGeometry, ...]
    slots: int

    def regions(self) -> list[tuple[int, int]]:
        """Address and length of the memory to register, joined where planes lie side by side."""
        last = self.slots - 1
        spans = sorted((plane.base, plane.base + last * plane.stride_bytes + plane.page_bytes) for plane in self.planes)
        joined: list[tuple[int, int]] = []
        for start, end in spans:
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        return [(start, end - start) for start, end in joined]


class Peer(NamedTuple):
    """Where a push goes: what a peer's transport says of itself, and the host pool that it registered."""

    session: str
    metadata: bytes
    pool: PoolGeometry


class Transport(Protocol):
    """One-sided writes of pages from this process's registered host pool into a peer's.

    ``push`` blocks the calling thread, releases the GIL while it waits, and returns only when the engine reports
    every byte delivered; it may be called from several threads at once.
    """

    @property
    def session(self) -> str:
        """The name under which peers address this process's registered memory."""

    @property
    def metadata(self) -> bytes:
        """What peers must know besides that name before they can push here; empty if nothing. Set by ``register``."""

    @property
    def drain_s(self) -> float:
        """Seconds after a failed push has ended in which bytes of it may still arrive."""

    def register(self, pool: PoolGeometry) -> None:
        """Make the pool's memory readable and writable by the engine. Once, before any push.

        Raises :class:`~sglang_dualpath.errors.TransferError` when the engine refuses it.
        """

    def push(self, peer: Peer, source_slots: Sequence[int], target_slots: Sequence[int]) -> None:
        """Write each page of ``source_slots`` into the peer's slot at the same position of ``target_slots``.

        Raises :class:`~sglang_dualpath.errors.TransferError` when any of it did not arrive; what arrived then is
        unknown, and more may until the error's ``over`` says so and for :attr:`drain_s` after that; but nothing did or
        will where it is a :class:`~sglang_dualpath.errors.NotPushedError`, as for pages that differ in their layout.
        """

    def close(self) -> None:
        """Undo ``register``. Idempotent."""


def coalesce(descriptors: Iterable[Descriptor]) -> list[Descriptor]:
    """Join neighbours that are contiguous on both sides.

    Engines pay per descriptor, and pages that SGLang allocated together lie together, so a chunk of many pages
    often becomes one descriptor per plane. The order of the input is kept, except that descriptors of the same plane
    should come one after the other for neighbours to meet.
    """
    joined: list[Descriptor] = []
    for one in descriptors:
        if joined:
            last = joined[-1]
            if last.source + last.length == one.source and last.destination + last.length == one.destination:
                joined[-1] = Descriptor(last.source, last.destination, last.length + one.length)
                continue
        joined.append(one)
    return joined


def check_layouts(
    source: PoolGeometry, source_slots: Sequence[int], target: PoolGeometry, target_slots: Sequence[int]
) -> None:
    """Raise NotPushedError when pages of the two pools would not mean the same, or their numbers differ."""
    if len(source_slots) != len(target_slots):
        raise NotPushedError(f"{len(source_slots)} source pages for {len(target_slots)} target pages")
    if [plane.page_bytes for plane in source.planes] != [plane.page_bytes for plane in target.planes]:
        raise NotPushedError("the pages of the two host pools differ in their layout")


def push_plan(
    source: PoolGeometry, source_slots: Sequence[int], target: PoolGeometry, target_slots: Sequence[int]
) -> list[Descriptor]:
    """Descriptors that copy each source slot into the target slot at the same position, coalesced per plane.

    For engines that are given addresses. Raises as :func:`check_layouts` does.
    """
    check_layouts(source, source_slots, target, target_slots)

    def pieces() -> Iterator[Descriptor]:
        for ours, theirs in zip(source.planes, target.planes, strict=True):
            for from_slot, to_slot in zip(source_slots, target_slots, strict=True):
                yield Descriptor(
                    ours.base + from_slot * ours.stride_bytes,
                    theirs.base + to_slot * theirs.stride_bytes,
                    ours.page_bytes,
                )

    return coalesce(pieces())
