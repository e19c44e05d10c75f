"""The hop over the NIXL agent that SGLang's own PD transfer created in this process.

SGLang's agent, not one of our own: it serialises calls (``NIXL_THREAD_SYNC_STRICT``), it has the backend and the NICs
that the deployment chose, and its progress thread takes a core already; a second agent would take another one. Each
side's agent is the other role here than in SGLang's transfers: decode engines load the metadata of prefill engines.

Writes carry no notification. NIXL reports a write as done once the peer has it all, and the DONE message says so; what
nobody fetches would pile up in an agent whose owner does not ask for notifications, as SGLang does not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang_dualpath import metrics
from sglang_dualpath.errors import NotPushedError, TransferError
from sglang_dualpath.protocol import MAX_METADATA_BYTES
from sglang_dualpath.transfer import ucx
from sglang_dualpath.transfer.base import Peer, PoolGeometry, check_layouts

logger = logging.getLogger(__name__)

_Indices = npt.NDArray[np.int32]

# As long as Mooncake waits by default.
_DEADLINE_S = 30.0
# What NIXL raises once a write has ended in an error. After any other one, it may still be under way.
_ENDED = frozenset({"nixlRemoteDisconnectError", "nixlBackendError", "nixlCancelledError"})
# NIXL has to be asked whether a write is done. Where all cores are busy, and NIXL's own threads keep one each busy, who
# sleeps wakes up as late as a kernel's time slice, some 3 ms, which is more than a chunk takes. So around the time at
# which a write should be done at the soonest it is asked without a pause, as SGLang does for all of its own: from
# _EAGER_S before, where there is nothing to ask yet, to as long after, or to that share of the time, which has a bound.
# Later the pauses grow with the time passed.
_EAGER_S = 5e-3
_EAGER_SHARE = 0.25
_MOST_EAGER_S = 20e-3
_PAUSE_SHARE = 0.05
_MOST_PAUSE_S = 20e-3
_FORGETTING = 1.1
_STRAGGLER_PAUSE_S = 0.05
# Prefill engines that restarted leave a peer behind each.
_MAX_PEERS = 256


class NixlTransport:
    """Pushes through a ``nixl_agent`` that is safe to use from several threads, or used by this transport alone.

    Pages are prepared once on both sides, so that a push is by page numbers; NIXL joins neighbours itself when it makes
    a transfer out of prepared pages.

    Args:
        agent: a ``nixl_agent`` with a backend for main memory.
        deadline_s: after it a push has failed. NIXL cannot call a write back (a released one goes on), so it is watched
            until it has ended, and until then its peer gets no other.
    """

    def __init__(self, agent: Any, *, deadline_s: float = _DEADLINE_S) -> None:
        self.drain_s = ucx.drain_s()
        self._agent = agent
        self._deadline_s = deadline_s
        self._pool = PoolGeometry((), 0)
        self._metadata = b""
        self._registered: Any = None
        self._pages: Any = None
        self._lock = threading.Condition()
        self._peers: dict[str, _Met] = {}
        self._stragglers: list[_Straggler] = []
        self._watcher: threading.Thread | None = None
        self._closed = False

    @property
    def session(self) -> str:
        return str(self._agent.name)

    @property
    def metadata(self) -> bytes:
        return self._metadata

    def register(self, pool: PoolGeometry) -> None:
        regions = pool.regions()
        try:
            self._registered = self._agent.register_memory([(*region, 0, "") for region in regions], "DRAM")
            # Of our own regions only: the whole metadata names every buffer of SGLang's.
            self._metadata = bytes(self._agent.get_partial_agent_metadata(self._registered, True))
            self._pages = self._agent.prep_xfer_dlist("", _prepared(pool), "DRAM")
        except Exception as fault:  # NIXL's exceptions have no base of their own
            size_bytes = sum(length for _, length in regions)
            raise TransferError(
                f"NIXL could not register {size_bytes} bytes of the host pool ({_said(fault)}); check the memlock limit"
            ) from fault
        if len(self._metadata) > MAX_METADATA_BYTES:
            raise TransferError(
                f"NIXL's metadata takes {len(self._metadata)} bytes, and {MAX_METADATA_BYTES} are allowed; give UCX "
                "fewer NICs with --disaggregation-ib-device or UCX_NET_DEVICES"
            )
        self._pool = pool
        self._closed = False
        # From the start: a thread that cannot be had when a write hangs would leave that write unwatched.
        self._watcher = threading.Thread(target=self._watch_all, name="dualpath-nixl-stragglers", daemon=True)
        self._watcher.start()

    # -- pushes --------------------------------------------------------------------------------------------------------

    def push(self, peer: Peer, source_slots: Sequence[int], target_slots: Sequence[int]) -> None:
        check_layouts(self._pool, source_slots, peer.pool, target_slots)
        if not source_slots:
            return
        # One push at a time for each peer: one connection carries them, and a failed one takes it down.
        met = self._hold(peer.session)
        try:
            if met.straggler is not None:
                if not met.straggler.ended:
                    raise NotPushedError(f"an earlier push to {peer.session} has not ended yet")
                if met.straggler.failed:
                    self._forget(met)
                met.straggler = None
            ours, theirs = _indices(self._pool, source_slots), _indices(peer.pool, target_slots)
            try:
                handle = self._make(met, peer, ours, theirs)
            except Exception as fault:
                raise NotPushedError(f"NIXL cannot write to {peer.session}: {_said(fault)}") from fault
            self._carry(met, peer.session, handle, len(source_slots))
        finally:
            met.lock.release()

    def _make(self, met: _Met, peer: Peer, ours: _Indices, theirs: _Indices) -> Any:
        """A write that is ready to be posted. Raises whatever NIXL raises."""
        was_met = met.peer == peer
        try:
            self._meet(met, peer)
            return self._agent.make_prepped_xfer("WRITE", self._pages, ours, met.pages, theirs)
        except Exception:
            self._forget(met)
            if not was_met:
                raise
        # Its metadata may have been loaded or dropped since by others that use the agent.
        return self._make(met, peer, ours, theirs)

    def _carry(self, met: _Met, session: str, handle: Any, pages: int) -> None:
        """Post a write and wait for its end. Releases ``handle``, or leaves it to a straggler."""
        why = "an error"
        began_s = time.monotonic()
        try:
            state = self._agent.transfer(handle)
        except Exception as fault:
            state, why = "ERR", _said(fault)
        took_s = time.monotonic() - began_s
        while state == "PROC" and took_s < self._deadline_s:
            time.sleep(_pause_s(took_s, expected_s=met.page_s * pages))
            state, why = _state(self._agent.check_xfer_state, handle)
            took_s = time.monotonic() - began_s
        if state == "PROC":
            met.straggler = self._watch(handle, session)
            raise TransferError(
                f"NIXL has not ended a push to {session} in {self._deadline_s:g} s", over=met.straggler.over
            )
        _release(handle)
        if state != "DONE":
            self._forget(met)
            raise TransferError(f"NIXL reported {why} for a push to {session}")
        # The least of late, since whoever sleeps until then is not late for the next one. Most are held up by others.
        met.page_s = min(took_s / pages, _FORGETTING * met.page_s) if met.page_s else took_s / pages

    # -- peers ---------------------------------------------------------------------------------------------------------

    def _hold(self, session: str) -> _Met:
        """A peer, with its lock acquired."""
        while True:
            with self._lock:
                # Those that were not used for longest come first.
                met = self._peers.pop(session, None) or _Met()
                self._peers[session] = met
            met.lock.acquire()
            with self._lock:
                if self._peers.get(session) is met:
                    leaving = self._hold_idle(len(self._peers) - _MAX_PEERS)
                    break
            met.lock.release()  # parted with meanwhile
        # Outside of the lock: disconnecting may take its time. A peer keeps its place until then, so that it is not
        # unloaded after somebody has met it again.
        for name, other in leaving:
            self._forget(other)
            with self._lock:
                self._peers.pop(name, None)
            other.lock.release()
        return met

    def _hold_idle(self, count: int) -> list[tuple[str, _Met]]:
        """With the lock held: up to so many peers to which nothing is on its way, with their locks acquired."""
        held: list[tuple[str, _Met]] = []
        for name, met in self._peers.items():
            if len(held) >= count:
                break
            if met.lock.acquire(blocking=False):
                if met.straggler is None or met.straggler.ended:
                    held.append((name, met))
                else:
                    met.lock.release()
        return held

    def _meet(self, met: _Met, peer: Peer) -> None:
        """Load the peer's metadata and prepare its pages, unless that is done."""
        if met.peer == peer:
            return
        self._forget(met)
        if not peer.metadata:
            raise TransferError("it did not say what NIXL must know of it")
        # NIXL tells whose metadata it is only after loading it, when it has changed what it knows of that agent; of one
        # whose metadata turns out to be broken it forgets everything, and then cannot say how a write to it goes on.
        if peer.session.encode() not in peer.metadata:
            raise TransferError("its metadata is that of another agent")
        name = self._agent.add_remote_agent(peer.metadata)
        name = name.decode() if isinstance(name, bytes) else name
        if name != peer.session:
            # Not unloaded: somebody else's writes may be under way by that name.
            raise TransferError(f"its metadata is that of {name}")
        met.name = name
        met.pages = self._agent.prep_xfer_dlist(name, _prepared(peer.pool), "DRAM")
        met.peer = peer

    def _forget(self, met: _Met) -> None:
        """Unprepare a peer, so that the next push connects again: NIXL keeps none that has once failed."""
        if met.pages is not None:
            _release(met.pages)
        if met.name is not None:
            try:
                self._agent.remove_remote_agent(met.name)
            except Exception as fault:
                logger.debug("NIXL had removed %s by itself (%s).", met.name, _said(fault))
        met.peer = met.pages = met.name = None

    # -- stragglers ----------------------------------------------------------------------------------------------------

    def _watch(self, handle: Any, session: str) -> _Straggler:
        straggler = _Straggler(handle, session, self.drain_s)
        with self._lock:
            self._stragglers.append(straggler)
            self._lock.notify_all()
        return straggler

    def _watch_all(self) -> None:
        while True:
            with self._lock:
                self._stragglers = [one for one in self._stragglers if not one.ended]
                while not self._stragglers and not self._closed:
                    self._lock.wait()
                if self._closed:
                    return
                stragglers = list(self._stragglers)
            for one in stragglers:
                one.look(self._agent.check_xfer_state)
            time.sleep(_STRAGGLER_PAUSE_S)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        if any(not one.ended for one in self._stragglers):
            logger.warning("The host pool stays registered with NIXL: a push that has not ended may read from it.")
            return
        with self._lock:
            peers, self._peers = list(self._peers.values()), {}
        for met in peers:
            with met.lock:
                self._forget(met)
        if self._pages is not None:
            _release(self._pages)
            self._pages = None
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
            self._registered = None


class _Met:
    """A peer, and what of it is prepared. Its lock guards all of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.peer: Peer | None = None
        self.name: str | None = None
        self.pages: Any = None
        self.straggler: _Straggler | None = None
        self.page_s = 0.0
        """How long writes take for each of their pages."""


class _Straggler:
    """A write that took too long. It may still write, so its handle is kept until NIXL says that it has ended.

    However long that takes, and though NIXL may never say it, which is so once it has forgotten the peer: what has been
    posted goes on. A frozen peer gets it all when it wakes, and NIXL lets go of a handle without stopping the write. So
    no time that passes tells that it has ended, nor does a release. To take it for ended would let the peer use its
    pages again under the write; to wait costs a few spare pages there, and the help of this engine, until one of the
    two restarts.
    """

    def __init__(self, handle: Any, session: str, drain_s: float) -> None:
        self._handle = handle
        self._session = session
        self._drain_s = drain_s
        self._over_s: float | None = None
        self._lost_s: float | None = None
        """Since when NIXL has not said how it goes on."""
        self._is_said = False
        self.failed = False

    @property
    def ended(self) -> bool:
        return self._over_s is not None

    def over(self) -> bool:
        """Whether no byte of it can arrive any more."""
        return self._over_s is not None and time.monotonic() >= self._over_s

    def look(self, check: Callable[[Any], str]) -> None:
        """See whether it has ended."""
        state, why = _state(check, self._handle)
        now_s = time.monotonic()
        if state != "PROC":
            _release(self._handle)
            self.failed = state != "DONE"
            self._over_s = now_s + (self._drain_s if self.failed else 0.0)
        elif not why:
            self._lost_s = None
        elif self._lost_s is None:
            self._lost_s = now_s
        elif now_s - self._lost_s >= self._drain_s and not self._is_said:
            self._is_said = True
            metrics.FALLBACKS.add(reason="push_state_unknown")
            logger.warning(
                "For %g s NIXL cannot say whether a push to %s goes on (%s). Nothing is read for that prefill engine "
                "until it can, or one of the two servers restarts.", self._drain_s, self._session, why,
            )  # fmt: skip


def _state(check: Callable[[Any], str], handle: Any) -> tuple[str, str]:
    """What NIXL says of a write, and why it failed or, while it may still be under way, why that cannot be had."""
    try:
        state = check(handle)
        return state, "" if state == "PROC" else "an error"
    except Exception as fault:
        name = type(fault).__name__
        if name in _ENDED:
            return "ERR", _said(fault)
        logger.debug("NIXL does not say how a write goes on: %s (%s).", name, _said(fault))
        return "PROC", _said(fault)


def _pause_s(took_s: float, expected_s: float) -> float:
    """How long to wait before a write is looked at, ``took_s`` after its beginning."""
    if took_s < expected_s - _EAGER_S:
        return min(_MOST_PAUSE_S, expected_s - _EAGER_S - took_s)
    if took_s < expected_s + min(max(_EAGER_S, _EAGER_SHARE * expected_s), _MOST_EAGER_S):
        return 0.0
    return min(_MOST_PAUSE_S, _PAUSE_SHARE * took_s)


def _prepared(pool: PoolGeometry) -> npt.NDArray[np.uint64]:
    """Every page of every plane, as runs of (address, bytes, device, stride, count); see :func:`_indices`."""
    runs = [(plane.base, plane.page_bytes, 0, plane.stride_bytes, pool.slots) for plane in pool.planes]
    return np.array(runs, dtype=np.uint64)


def _indices(pool: PoolGeometry, slots: Sequence[int]) -> _Indices:
    """Positions of ``slots`` among the prepared pages, plane by plane: int32, shape ``(planes * len(slots),)``."""
    starts = range(0, len(pool.planes) * pool.slots, pool.slots)
    # One step through numpy: a copy of a chunk leaves nothing in the caches, so that each of them takes its time.
    return np.array([start + slot for start in starts for slot in slots], dtype=np.int32)


def _release(handle: Any) -> None:
    try:
        handle.release()
    except Exception as fault:
        # NIXL keeps what it could not release on a list of its own, and tries again when the agent ends.
        logger.debug("NIXL did not release %r (%s).", handle, _said(fault))


def _said(fault: Exception) -> str:
    return str(fault) or type(fault).__name__
