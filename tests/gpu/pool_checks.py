"""SGLang's pinned host pools and the kernels that copy them, with a real hop between two processes."""

from __future__ import annotations

import itertools
import unittest
from typing import Any

from tests.gpu import machine

DEVICE = "cuda"
POOLS = tuple(itertools.product(("mha", "mla"), ("page_first", "page_first_direct")))
# Pages that lie neither in order nor side by side, so that nothing is right only because they do.
PAGES = [5, 1, 2, 7]
SOURCE_SLOTS = [10, 0, 7, 4]
TARGET_SLOTS = [3, 11, 6, 1]
LOADED_PAGES = [3, 6, 4, 0]


class Pools(unittest.TestCase):
    """Two processes, each with a device pool, a host pool and a transfer engine."""

    here: Any
    there: Any

    @classmethod
    def setUpClass(cls) -> None:
        sentence = machine.missing()
        if sentence is not None:
            raise unittest.SkipTest(sentence)
        from benchmarks.micro.fabrics import fabric
        from benchmarks.micro.workers import Worker
        from tests.gpu.pools import PoolEnd

        engine = machine.engine()
        assert engine is not None
        cls.here, cls.there = (
            cls.enterClassContext(Worker(name, PoolEnd, engine, DEVICE, environment=fabric(engine).environment))
            for name in ("here", "there")
        )

    def use(self, model: str, layout: str) -> None:
        """Pools of this kind on both sides, with bytes of their own in every page."""
        for seed, end in enumerate((self.here, self.there)):
            end.call("use", model, layout)
            end.call("fill", seed)

    def test_pages_pushed_into_pinned_pools_arrive_byte_for_byte(self) -> None:
        """SGLang's pinned host pools: transfer engines register them, and pages arrive where they are meant."""
        for model, layout in POOLS:
            with self.subTest(model=model, layout=layout):
                self.use(model, layout)
                self.assertEqual([end.call("is_pinned") for end in (self.here, self.there)], [True, True])
                ours, expected = self.here.call("host_digests"), self.there.call("host_digests")
                for source, target in zip(SOURCE_SLOTS, TARGET_SLOTS, strict=True):
                    expected[target] = ours[source]
                self.here.call("push", self.there.call("peer"), SOURCE_SLOTS, TARGET_SLOTS)
                self.assertEqual(self.there.call("host_digests"), expected)
                self.assertEqual(self.here.call("host_digests"), ours)

    def test_pages_reach_the_other_device_as_they_left_this_one(self) -> None:
        """SGLang's copy kernels (`page_first`) and batched copies: device, pinned host, hop, pinned host, device."""
        for model, layout in POOLS:
            with self.subTest(model=model, layout=layout):
                self.use(model, layout)
                ours, expected = self.here.call("device_digests"), self.there.call("device_digests")
                for source, target in zip(PAGES, LOADED_PAGES, strict=True):
                    expected[target] = ours[source]
                self.here.call("backup", PAGES, SOURCE_SLOTS)
                self.here.call("push", self.there.call("peer"), SOURCE_SLOTS, TARGET_SLOTS)
                self.there.call("load", TARGET_SLOTS, LOADED_PAGES)
                self.assertEqual(self.there.call("device_digests"), expected)
                self.assertEqual(self.here.call("device_digests"), ours)
