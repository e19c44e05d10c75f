"""A storage backend that tests break while servers run: SGLang's file backend, slowed down, failing or losing pages.

What is wrong is read from ``faults.json`` beside the pages, by the role in ``$DUALPATH_TEST_ROLE``:
``{"decode": {"page_s": 0.02, "error": true, "lose": 5}}``. ``page_s`` delays each page; ``error`` raises; ``lose`` = n
makes every n-th page (by its hash) unreadable though it is said to exist, as after an eviction between query and read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheFile

ROLE_ENV = "DUALPATH_TEST_ROLE"
BACKEND = {"backend_name": "faulty", "module_path": "tests.e2e.faulty_store", "class_name": "FaultyStore",
           "interface_v1": 1}  # fmt: skip
"""What SGLang is told of it."""


class FaultyStore(HiCacheFile):
    """Has the zero-copy getters of real backends, so that it is used as they are."""

    def __init__(self, storage_config: Any, kwargs: Mapping[str, Any]) -> None:
        super().__init__(storage_config)
        self._faults = Path(self.file_path).parent / "faults.json"
        self._role = os.environ[ROLE_ENV]

    def _fault(self) -> Mapping[str, Any]:
        try:
            return dict(json.loads(self._faults.read_text()).get(self._role, {}))
        except (OSError, ValueError):
            return {}

    def batch_get_v1(self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        fault = self._fault()
        if fault.get("error"):
            raise OSError("the test says that this read fails")
        pool = self.mem_pool_host
        good = []
        for number, key in enumerate(keys):
            time.sleep(fault.get("page_s", 0.0))
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
