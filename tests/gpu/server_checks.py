"""Real servers on one CUDA device: DualPath's outputs are stock SGLang's, with everything on that a CPU cannot run."""

from __future__ import annotations

import random
import unittest
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tests.gpu import machine

Differences = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


class Servers(unittest.TestCase):
    """A stock pair answers all prompts and is ended; then a DualPath pair runs, with a store of its own."""

    maxDiff = None
    pair: Any
    prompts: Mapping[str, Any]
    stored: Mapping[str, Any]  # the prompts that every check may have sent before
    expected: Mapping[str, tuple[int, ...]]

    @classmethod
    def setUpClass(cls) -> None:
        sentence = machine.missing()
        if sentence is not None:
            raise unittest.SkipTest(sentence)
        from tests.gpu import servers

        cls.prompts = servers.prompts()
        cls.stored = {name: tokens for name, tokens in cls.prompts.items() if not name.startswith("fresh")}
        with servers.cluster(servers.stock_servers(), "stock") as stock:
            cls.expected = servers.ask_all(stock, cls.prompts)
            stock.flush()
            again = servers.ask_all(stock, cls.prompts, at_once=8)
        unlike = [name for name, output in cls.expected.items() if again[name] != output]
        if unlike:
            raise AssertionError(f"Stock SGLang differs from itself on this machine, so it is no reference: {unlike}")
        cls.pair = cls.enterClassContext(servers.cluster(servers.dualpath_servers(), "dualpath"))
        servers.ask_all(cls.pair, cls.stored)

    def ask(self, prompts: Mapping[str, Any], **how: Any) -> Differences:
        """Where outputs differ from stock SGLang's, by prompt: (got, expected)."""
        from tests.e2e.prompts import differences
        from tests.gpu.servers import ask_all

        return differences(ask_all(self.pair, prompts, **how), self.expected)

    @contextmanager
    def counted(self) -> Iterator[list[Any]]:
        """Yields a list that holds, afterwards, what the servers counted meanwhile."""
        from tests.e2e.counters import count

        before = count(self.pair)
        seen: list[Any] = []
        yield seen
        seen.append(count(self.pair).since(before))

    def test_servers_run_with_what_needs_a_gpu(self) -> None:
        """Overlap scheduling, the `kernel` IO backend and `page_first`: both servers say that they run with them."""
        from tests.gpu.servers import SHOWN

        for name in self.pair.names:
            info = self.pair.clients[name].get("/server_info").json()
            self.assertEqual({key: info[key] for key in SHOWN}, SHOWN, name)

    def test_outputs_with_nothing_cached(self) -> None:
        """Overlap scheduling on both sides: requests that find nothing are answered as by stock SGLang."""
        self.pair.flush()
        fresh = {name: tokens for name, tokens in self.prompts.items() if name not in self.stored}
        with self.counted() as seen:
            self.assertEqual(self.ask(fresh), {})
        self.assertEqual(seen[0].total("read_bytes_total"), 0)

    def test_outputs_with_everything_from_storage(self) -> None:
        """Pinned `page_first` pools on both sides of a shared read, loaded to the device by SGLang's kernels."""
        self.pair.flush()
        with self.counted() as seen:
            self.assertEqual(self.ask(self.stored), {})
        for role in ("prefill", "decode"):
            self.assertGreater(seen[0].total("read_bytes_total", role), 0, f"{role} read nothing")
        self.assertGreater(seen[0].total("pushed_bytes_total"), 0)

    def test_outputs_where_one_side_holds_more(self) -> None:
        """Hops of pages that the decode server's kernels wrote back; a decode server that has less than prefill."""
        some = {name: tokens for name, tokens in list(self.stored.items())[8::3] if len(tokens) < 4000}
        for flushed in ("prefill", "decode"):
            with self.subTest(flushed=flushed):
                self.assertEqual(self.ask(some), {})
                self.pair.flush(prefill=flushed == "prefill", decode=flushed == "decode")
                with self.counted() as seen:
                    self.assertEqual(self.ask(some), {})
                if flushed == "prefill":
                    self.assertGreater(seen[0].total("pushed_bytes_total"), 0)

    def test_outputs_in_a_storm_over_mixed_caches(self) -> None:
        """Load-back beside hops: requests at once, some of whose pages are in host memory alone, others in storage."""
        from tests.gpu.servers import loaded_back_bytes

        source = random.Random("storm")
        *names, longest = sorted(self.stored, key=lambda name: len(self.stored[name]))
        for first in range(3):
            self.pair.flush()
            # More than the device holds, the longest last: those before it are left in host memory alone.
            held = [*(name for name in names if name not in names[first::3]), longest]
            self.assertEqual(self.ask(self.stored, names=held), {})
            loaded_bytes = loaded_back_bytes(self.pair)
            storm = source.sample([*names, longest], len(self.stored))
            with self.counted() as seen:
                self.assertEqual(self.ask(self.stored, names=storm, at_once=8), {})
            self.assertGreater(seen[0].total("pushed_bytes_total"), 0)
            # What was read or hopped is loaded from host memory, too. The rest was there before.
            landed_bytes = sum(
                seen[0].total(name, server="prefill") for name in ("read_bytes_total", "received_bytes_total")
            )
            self.assertGreater(loaded_back_bytes(self.pair) - loaded_bytes, landed_bytes)
