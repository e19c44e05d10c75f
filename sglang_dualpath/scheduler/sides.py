"""What a scheduler with the switch on has besides upstream's: the prefill side or the decode side, wired up."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from typing import Any

import msgspec
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.environ import envs

from sglang_dualpath import metrics
from sglang_dualpath.compat.hooks import stop
from sglang_dualpath.config import DualPathConfig, read_config
from sglang_dualpath.connector.directory import EndpointLookup, publish
from sglang_dualpath.connector.rooms import real_room
from sglang_dualpath.control import ControlClient, ControlServer
from sglang_dualpath.errors import DualPathError
from sglang_dualpath.hicache.decode import DecodePath
from sglang_dualpath.hicache.plans import SharedPlans
from sglang_dualpath.hicache.prefill import PrefillPath
from sglang_dualpath.hicache.ranks import Ranks, make_ranks
from sglang_dualpath.hicache.reserve import HostReserve
from sglang_dualpath.policy import load_policy
from sglang_dualpath.protocol import NoOfferReason
from sglang_dualpath.reader.decode import DecodeRead, DecodeReads
from sglang_dualpath.reader.hop import HopReader
from sglang_dualpath.reader.offers import OfferDesk
from sglang_dualpath.reader.own import OwnReaders
from sglang_dualpath.reader.pool import HostPages
from sglang_dualpath.reader.prefetch import ReadLimit
from sglang_dualpath.reader.prefill import PrefillReads
from sglang_dualpath.transfer import Transport

logger = logging.getLogger(__name__)

# Backends whose getter was seen to serve several threads from one instance.
_CONCURRENT_BACKENDS = ("mooncake", "file")
_PARK_S = 0.02


def build_side(scheduler: Any) -> PrefillSide | DecodeSide:
    """Wire up the side of ``scheduler``, whose queues exist. Ends the process with one sentence if that fails."""
    try:
        config = read_config()
        if config is None:
            raise DualPathError("the DualPath scheduler runs without --kv-connector dualpath in its environment")
        config = _within(config, envs.SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT.get())
        if scheduler.disaggregation_mode == DisaggregationMode.PREFILL:
            return PrefillSide(scheduler, config)
        return DecodeSide(scheduler, config)
    except (DualPathError, OSError) as error:
        stop(f"--kv-connector dualpath: {error}")
        raise


def _engine_id(role: str) -> str:
    return f"{role}-{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"


def _host_pages(scheduler: Any) -> HostPages:
    controller = scheduler.tree_cache.cache_controller
    if scheduler.tree_cache.sidecar_pool_specs:
        raise DualPathError("this model's cache has side pools besides its KV pages, which are not supported yet")
    return HostPages(controller.storage_host_pool, controller.page_size)


def _ranks(scheduler: Any, manager: Any) -> Ranks:
    return make_ranks(scheduler.attn_tp_cpu_group, rank=manager.attn_tp_rank, size=manager.attn_tp_size)


def _transport(manager: Any, pages: HostPages, storage: object) -> Transport:
    transport: Transport = manager.transport(storage)
    transport.register(pages.geometry)
    return transport


def _reader_threads(config: DualPathConfig, backend: str) -> int:
    if config.reader_threads > 1 and backend not in _CONCURRENT_BACKENDS:
        logger.info("One reader thread is used: the %s backend is not known to serve several.", backend)
        return 1
    return config.reader_threads


def _part_of(config: DualPathConfig, manager: Any) -> DualPathConfig:
    """What the server may do, for one of its engines: each of its ranks reads an equal part."""
    engines = manager.attn_tp_size * manager.system_dp_size
    limit = config.read_rate_limit_bytes_per_s
    return msgspec.structs.replace(config, read_rate_limit_bytes_per_s=max(1, limit // engines)) if limit else config


def _within(config: DualPathConfig, bootstrap_timeout_s: float) -> DualPathConfig:
    """Reads end in half of the time after which SGLang fails a request whose bootstrap they hold back.

    Raises DualPathError if a lease would not fit into that.
    """
    longest_s = bootstrap_timeout_s / 2
    if config.read_deadline_s <= longest_s:
        return config
    if config.lease_s >= longest_s:
        raise DualPathError(
            f"SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT={bootstrap_timeout_s:g} leaves reads {longest_s:g} s, and "
            f"--dualpath-lease is {config.lease_s:g}: raise the one or lower the other"
        )
    logger.warning(
        "Reads end after %g s instead of --dualpath-read-deadline %g: SGLang fails a request that bootstraps for "
        "longer than SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT, %g s.",
        longest_s, config.read_deadline_s, bootstrap_timeout_s,
    )  # fmt: skip
    return msgspec.structs.replace(config, read_deadline_s=longest_s)


def _reachable(endpoint: str, address: str) -> str:
    """The endpoint as others reach it: one that is bound to all addresses has the server's own ``address``."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if host not in ("0.0.0.0", "[::]"):
        return endpoint
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _count_error(kind: str) -> None:
    metrics.CONTROL_ERRORS.add(kind=kind)


class PrefillSide:
    """Opens reads for prefetches, answers decode engines, and reissues prefetches that upstream declined for now."""

    def __init__(self, scheduler: Any, config: DualPathConfig) -> None:
        self._scheduler = scheduler
        self._queue = scheduler.disagg_prefill_bootstrap_queue
        self._parked: dict[Any, float] = {}
        tree = scheduler.tree_cache
        controller = tree.cache_controller
        manager = self._queue.kv_manager
        config = _part_of(config, manager)
        pages = _host_pages(scheduler)
        self._ranks = _ranks(scheduler, manager)
        lock = threading.Condition()
        reserve = HostReserve(controller.mem_pool_host, pages, size_bytes=config.reserve_bytes, lock=lock)
        transport = _transport(manager, pages, controller.storage_backend)
        self.reads = PrefillReads(config=config, pages=pages, reserve=reserve.reserve, lock=lock)
        engine = _engine_id("prefill")
        desk = OfferDesk(
            self.reads,
            policy=load_policy(config.policy),
            engine=engine,
            session=transport.session,
            metadata=transport.metadata,
            send=lambda peer, message: self._control.send(peer, message),
            rank=self._ranks.rank,
            tp_size=self._ranks.size,
        )
        plans = SharedPlans(desk, self._ranks) if self._ranks.size > 1 else None
        self.path = PrefillPath(controller, self.reads, plans)
        self.path.park = self._park
        self._control = ControlServer(
            config.host or manager.local_ip,
            config.read_key(),
            desk.handle,
            _count_error,
            handler_gone=desk.gone,
            tick=desk.tick,
        )
        self._own = OwnReaders(
            self.reads,
            count=_reader_threads(config, controller.storage_backend_type),
            limit=ReadLimit(config.read_rate_limit_bytes_per_s),
        )
        controller.use(self.path)
        tree.use(self.path, reserve)
        # As SGLang's own registry counts: without attention data parallelism, a data-parallel rank is a whole engine.
        dp_rank = manager.system_dp_rank
        endpoint = _reachable(self._control.endpoint, manager.local_ip)
        publish(_bootstrap_url(manager), dp_rank=dp_rank, tp_rank=self._ranks.rank, endpoint=endpoint)
        logger.info(
            "DualPath prefill engine %s: dp %d, tp %d of %d, policy %s, control %s, %d host pages of %d bytes, %d in "
            "reserve.", engine, dp_rank, self._ranks.rank, self._ranks.size, config.policy, endpoint,
            pages.slots, pages.page_bytes, reserve.reserve.size,
        )  # fmt: skip

    def arrived(self, req: Any) -> None:
        """Upstream is about to look for this request's pages."""
        room = real_room(req)
        if room is not None:
            self.reads.arrived(room, req.cache_request_handle)

    def looked_up(self, req: Any) -> None:
        """Upstream has looked. It may have asked storage for nothing without a word to its tree."""
        handle = req.cache_request_handle
        if handle not in self._parked and handle not in self._scheduler.tree_cache.ongoing_prefetch:
            self.reads.passed_over(handle)

    def tick(self) -> None:
        """Reissue parked prefetches whose time has come on every rank, in the order in which they were parked."""
        if not self._parked:
            return
        now = self.reads.clock()
        due = self._ranks.least([now >= due_s for due_s in self._parked.values()])
        waiting = {req.cache_request_handle: req for req in self._queue.queue if req.pending_bootstrap}
        controller = self._scheduler.tree_cache.cache_controller
        for handle, is_due in zip(list(self._parked), due, strict=True):
            req = waiting.get(handle)
            if req is None:
                # Admitted or aborted meanwhile: from here on upstream's own retries count.
                del self._parked[handle]
                self.path.declined(handle, NoOfferReason.CLOSED)
            elif is_due and not controller.prefetch_rate_limited():
                del self._parked[handle]
                self._scheduler._prefetch_kvcache(req)

    def _park(self, handle: Any, reason: str) -> None:
        self.reads.parked(handle, reason)
        self._parked[handle] = self.reads.clock() + _PARK_S


def _bootstrap_url(manager: Any) -> str:
    """Where SGLang's bootstrap server of this prefill server listens."""
    host = manager.bootstrap_host
    if manager.dist_init_addr:
        host = manager.dist_init_addr.rpartition(":")[0].strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{manager.bootstrap_port}" if ":" in host else f"http://{host}:{manager.bootstrap_port}"


class DecodeSide:
    """Starts a read for each accepted request and holds its bootstrap back until it has settled."""

    def __init__(self, scheduler: Any, config: DualPathConfig) -> None:
        self._queue = scheduler.disagg_decode_prealloc_queue
        tree = scheduler.tree_cache
        controller = tree.cache_controller
        manager = self._queue.kv_manager
        config = _part_of(config, manager)
        pages = _host_pages(scheduler)
        self._ranks = _ranks(scheduler, manager)
        self._unequal: set[str] = set()
        transport = _transport(manager, pages, controller.storage_backend)
        engine = _engine_id("decode")
        self._lookup = EndpointLookup()
        self.reads = DecodeReads(
            config=config,
            pages=pages,
            engine=engine,
            rank=self._ranks.rank,
            tp_size=self._ranks.size,
            send=lambda endpoint, message: self._control.send(endpoint, message),
        )
        self.reads.on_silence = self._lookup.forget
        self.path = DecodePath(tree, controller, self.reads, self._ranks)
        self._control = ControlClient(engine, config.read_key(), self.reads.handle, _count_error, tick=self.reads.tick)
        self._hop = HopReader(
            self.reads,
            transport,
            count=_reader_threads(config, controller.storage_backend_type),
            limit=ReadLimit(config.read_rate_limit_bytes_per_s),
        )
        controller.use(self.path)
        tree.use(self.path)
        manager.gate = self
        logger.info(
            "DualPath decode engine %s: dp %d, tp %d of %d, %d host pages of %d bytes.",
            engine, manager.system_dp_rank, self._ranks.rank, self._ranks.size, pages.slots, pages.page_bytes,
        )  # fmt: skip

    def added(self, req: Any) -> None:
        """Upstream's queue was offered ``req``; it may have rejected it."""
        queue = self._queue.queue
        if not queue or queue[-1].req is not req or queue[-1].is_rebootstrap:
            return
        receiver = queue[-1].kv_receiver
        read = self.path.accept(req, receiver)
        dp_rank = getattr(receiver, "prefill_dp_rank", None)
        if read is not None and dp_rank is not None:
            self._greet(read, receiver, dp_rank)

    def located(self, room: int, receiver: Any, dp_rank: int) -> None:
        read = self.path.read_for(room, receiver)
        if read is not None:
            self._greet(read, receiver, dp_rank)

    def _greet(self, read: DecodeRead, receiver: Any, dp_rank: int) -> None:
        """Say HELLO to the engine that has the request: the same tensor-parallel rank of that data-parallel one."""
        prefill_server = getattr(receiver, "prefill_info", None)  # set when SGLang has it
        if prefill_server is not None and prefill_server.attn_tp_size != self._ranks.size:
            self._refuse(read, receiver.bootstrap_addr, prefill_server.attn_tp_size)
            return
        self.reads.sought(read)
        self._lookup.find(
            receiver.bootstrap_addr,
            dp_rank=dp_rank,
            tp_rank=self._ranks.rank,
            then=lambda endpoint: self.reads.greet(read, endpoint),
        )

    def _refuse(self, read: DecodeRead, address: str, tp_size: int) -> None:
        if address not in self._unequal:
            self._unequal.add(address)
            logger.warning(
                "The prefill server of %s has --tp-size %d, this one %d; pages are pushed rank to rank, so it reads "
                "alone. Give both servers the same.",
                address, tp_size, self._ranks.size,
            )  # fmt: skip
        self.reads.greet(read, None, "tp_size")

    def pending(self, room: int) -> bool:
        return self.reads.pending(room)

    def gone(self, room: int, receiver: object) -> None:
        self.path.gone(room, receiver)
