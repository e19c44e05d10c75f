"""A storage backend that tests break while servers run: SGLang's file backend, slowed down, failing or losing pages.

What is wrong is read from ``faults.json`` beside the pages, by the role in ``$DUALPATH_TEST_ROLE``, for all its ranks
or for one: ``{"decode": {"page_s": 0.02, "error": true, "lose": 5}, "prefill.1": {"hop_s": 0.1, "control_s": 0.1}}``.
``page_s`` delays each page, ``read_s`` each read of some; ``error`` raises; ``lose`` = n makes every n-th page (by its
hash) unreadable though it is said to exist, as after an eviction between query and read. ``hop_s`` delays each push
that the rank makes, ``late_push_s`` does so when it has looked for the last time whether the push is still wanted, and
``control_s`` delays each message that it hears: the store is loaded into the rank's process before its reads are set
up. ``every`` = n delays only the first of each n.

Each rank writes how many tokens of its host pool are free into ``free-<role>.<rank>``, a few times a second,
and how often it delayed what into ``delays-<role>.<rank>``. While there is a file ``explain``, it also writes what
its requests wait for into ``waiting-<role>.<rank>``. It accounts for its pages when asked, see ``accounts.py``.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheFile

from tests.e2e.accounts import answer_for_accounts
from tests.e2e.stuck import waiting_requests, watch_queues

ROLE_ENV = "DUALPATH_TEST_ROLE"
BACKEND = {"backend_name": "faulty", "module_path": "tests.e2e.faulty_store", "class_name": "FaultyStore",
           "interface_v1": 1}  # fmt: skip
"""What SGLang is told of it."""


def _delay_reads_of_this_process(fault: Callable[[], Mapping[str, Any]]) -> None:
    from sglang_dualpath.reader.carriage import Carriage
    from sglang_dualpath.reader.decode import DecodeReads
    from sglang_dualpath.reader.hop import HopReader
    from sglang_dualpath.reader.offers import OfferDesk

    for cls, method, kind in (
        (HopReader, "push", "hop_s"),
        (OfferDesk, "handle", "control_s"),
        (DecodeReads, "handle", "control_s"),
    ):
        setattr(cls, method, _late(getattr(cls, method), fault, kind))
    refused_push = Carriage.refused_push

    @functools.wraps(refused_push)
    def late_push(self: Any, chunk: Any) -> str | None:
        problem = refused_push(self, chunk)
        if problem is None:
            _delay("late_push_s", fault())
        return problem

    Carriage.refused_push = late_push


_delays: Counter[str] = Counter()
_turns: Counter[str] = Counter()


def _delay(kind: str, fault: Mapping[str, Any]) -> None:
    if delay_s := fault.get(kind, 0.0):
        turn = _turns[kind]
        _turns[kind] += 1
        if turn % fault.get("every", 1) == 0:
            _delays[kind] += 1
            time.sleep(delay_s)


def _late(original: Callable[..., Any], fault: Callable[[], Mapping[str, Any]], kind: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def late(*args: Any) -> Any:
        _delay(kind, fault())
        return original(*args)

    return late


class FaultyStore(HiCacheFile):
    """Has the zero-copy getters of real backends, so that it is used as they are."""

    def __init__(self, storage_config: Any, kwargs: Mapping[str, Any]) -> None:
        super().__init__(storage_config)
        self._directory = Path(self.file_path).parent
        self._names = (os.environ[ROLE_ENV], f"{os.environ[ROLE_ENV]}.{storage_config.tp_rank}")
        _delay_reads_of_this_process(self._fault)
        watch_queues()
        answer_for_accounts(self._directory, self._names[1])
        threading.Thread(target=self._report, name="faulty-store-report", daemon=True).start()

    def _fault(self) -> Mapping[str, Any]:
        try:
            faults = json.loads((self._directory / "faults.json").read_text())
        except (OSError, ValueError):
            return {}
        return {kind: value for name in self._names for kind, value in faults.get(name, {}).items()}

    def _report(self) -> None:
        while True:
            time.sleep(0.2)
            pool = getattr(self, "mem_pool_host", None)
            if pool is not None:
                self._write("free", str(pool.available_size()))
                self._write("delays", json.dumps(_delays))
            if (self._directory / "explain").exists() and (waiting := waiting_requests()):
                self._write("waiting", waiting)

    def _write(self, what: str, text: str) -> None:
        unfinished = self._directory / f"{what}-{self._names[1]}.tmp"
        unfinished.write_text(text)
        unfinished.replace(self._directory / f"{what}-{self._names[1]}")

    def batch_get_v1(self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        fault = self._fault()
        if fault.get("error"):
            raise OSError("the test says that this read fails")
        _delay("read_s", fault)
        pool = self.mem_pool_host
        good = []
        for number, key in enumerate(keys):
            _delay("page_s", fault)
            lost = "lose" in fault and int(key[:8], 16) % fault["lose"] == 0
            page = None if lost else self.get(key, pool.get_dummy_flat_data_page())
            if page is not None:
                pool.set_from_flat_data_page(int(host_indices[number * pool.page_size]), page)
            good.append(page is not None)
        return good

    def batch_set_v1(self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        pool = self.mem_pool_host
        return [
            bool(self.set(key, pool.get_data_page(int(host_indices[number * pool.page_size]))))
            for number, key in enumerate(keys)
        ]
