"""Whether each rank still has all of its pages, told by the servers themselves before a flush.

A flush rebuilds SGLang's pools, so what was lost before it is free again after it. Before one, pages that are in use
are mostly cache, and SGLang's tree (in Rust) shows neither its nodes nor their locks. So a rank that is asked gives up
all that its tree lets it give up. What is in use then is nobody's, or somebody forgot to unlock it: nothing is in
flight when the tests ask.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

# -- in the servers ----------------------------------------------------------------------------------------------------


def answer_for_accounts(directory: Path, rank: str) -> None:
    """Let this process, which is `rank`, answer `unaccounted`."""
    original = UnifiedRadixCache.check_hicache_events
    answered = 0

    @functools.wraps(original)
    def check_hicache_events(self: Any) -> None:
        nonlocal answered
        original(self)
        try:
            asked = int((directory / "accounts").read_text())
        except OSError:
            return
        if asked > answered:
            answered = asked
            _write(directory / f"accounts-{rank}", json.dumps({"asked": asked, "problems": problems_of(self)}))

    UnifiedRadixCache.check_hicache_events = check_hicache_events


def problems_of(tree: Any) -> list[str]:
    """What is not as it has to be in an engine that nothing is asked of. Empties its tree. Scheduler thread."""
    controller = tree.cache_controller
    busy = {
        "prefetches": len(tree.ongoing_prefetch),
        "copies to host memory": len(tree.ongoing_write_through),
        "copies to the device": len(tree.ongoing_load_back),
        "writes to storage": len(tree.ongoing_backup),
        "pages about to be freed": controller.host_mem_release_queue.qsize(),
    }
    problems = [f"{count} {what} in flight" for what, count in busy.items() if count]
    if problems:
        return problems
    pool, device = controller.storage_host_pool, tree.token_to_kv_pool_allocator
    # Not by the methods that SGLang's check of its ranks follows: they may be asked in different iterations.
    tree._evict(EvictParams(num_tokens=device.size))
    tree.evict_host(pool.size)
    in_use = {token // pool.page_size for token in pool.slot_used.nonzero().flatten().tolist()}
    reserve = _reserve_pages(tree)
    if lost := in_use - reserve:
        problems.append(f"{len(lost)} host pages are lost or locked: {sorted(lost)[:8]}")
    if shared := reserve - in_use:
        problems.append(f"{len(shared)} host pages of the reserve are in the pool, too: {sorted(shared)[:8]}")
    if controller.prefetch_tokens_occupied:
        problems.append(f"{controller.prefetch_tokens_occupied} tokens occupied by prefetches")
    if missing := device.size // pool.page_size * pool.page_size - device.available_size():
        problems.append(f"{missing} device tokens are lost or locked")
    return problems


def _reserve_pages(tree: Any) -> set[int]:
    """Host pages that a prefill engine holds outside of SGLang's pool: spares, and those that may still be written to.

    Spares that back a claim are among the former.
    """
    held = getattr(tree, "_reserve", None)
    if held is None:
        return set()
    with held._lock:
        return {*held.reserve._spares, *held.reserve.exposed_slots()}


def _write(file: Path, text: str) -> None:
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(text)
    unfinished.replace(file)


# -- in the tests ------------------------------------------------------------------------------------------------------


def unaccounted(directory: Path, ranks: Collection[str], *, patience_s: float = 20.0) -> list[str]:
    """What is wrong with the pages of these ranks, after up to ``patience_s`` in which last words may still come."""
    deadline = time.monotonic() + patience_s
    while (problems := _ask(directory, ranks)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return problems


def _ask(directory: Path, ranks: Collection[str]) -> list[str]:
    number = time.time_ns()
    _write(directory / "accounts", str(number))
    deadline = time.monotonic() + 5  # schedulers without work look once a second
    while silent := [rank for rank, answer in _answers(directory, ranks).items() if answer.get("asked") != number]:
        if time.monotonic() > deadline:
            return [f"{rank} says nothing" for rank in silent]
        time.sleep(0.05)
    return [f"{rank}: {what}" for rank, answer in _answers(directory, ranks).items() for what in answer["problems"]]


def _answers(directory: Path, ranks: Collection[str]) -> dict[str, dict[str, Any]]:
    files = {rank: directory / f"accounts-{rank}" for rank in ranks}
    return {rank: json.loads(file.read_text()) if file.exists() else {} for rank, file in files.items()}
