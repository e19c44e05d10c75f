"""What the requests of a decode server's transfer queue wait for, told by the server itself while they wait."""

from __future__ import annotations

import functools
from typing import Any

from sglang.srt.disaggregation.decode import DecodeTransferQueue

_queues: list[Any] = []


def watch_queues() -> None:
    """Remember this process's transfer queues. (SGLang freezes what it made at start, so gc lists them no more.)"""
    original = DecodeTransferQueue.pop_transferred

    @functools.wraps(original)
    def pop_transferred(self: Any, *arguments: Any, **options: Any) -> Any:
        if self not in _queues:
            _queues.append(self)
        return original(self, *arguments, **options)

    DecodeTransferQueue.pop_transferred = pop_transferred


def waiting_requests() -> str:
    """A line for each request of this process that waits for its KV cache, with all that its end depends on."""
    return "\n".join(_line(waiting, queue.metadata_buffers) for queue in _queues for waiting in list(queue.queue))


def _line(waiting: Any, metadata: Any) -> str:
    try:
        return _state(waiting, metadata)
    except Exception as fault:  # the scheduler goes on meanwhile
        return f"unknown: {fault!r}"


def _state(waiting: Any, metadata: Any) -> str:
    room, receiver = waiting.req.bootstrap_room, waiting.kv_receiver
    if receiver is None:
        return f"room {room}: no receiver"
    manager = receiver.kv_mgr
    row = waiting.metadata_buffer_index
    return (
        f"room {room}: transfer {manager.request_status.get(room)!r}, concluded {receiver.conclude_state!r}, "
        f"prefill ranks heard {manager.prefill_response_tracker.get(room)} "
        f"of {manager.required_prefill_response_num_table.get(room)}, "
        f"metadata row {row} is of room {metadata.bootstrap_room[row, 0].item()}, "
        f"restore {waiting.hicache_restore_status!r}, its load {waiting.hicache_load_consumer_index}, "
        f"prefix {waiting.prefix_match!r:.300}"
    )
