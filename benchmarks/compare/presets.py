"""The settings that have a name. The fixed ones (SNIC 200, CNIC 1,600 Mbit/s, 8 agents in flight per prefill server,
contexts of 6,000 to 8,000 tokens) are the defaults of `Settings`, so that no preset can quietly be kinder.

Pools are sized so that stock's prefetch window (half of a prefill server's host pool) holds all requests in flight
wherever memory allows: none has to wait for another's prefetch, and a decode server can accept all requests at once.
With one round per repetition nothing is asked for twice, and with more caches are dropped in between, so that large
pools do not turn hits in storage into hits in memory. Poisson reads go to a context each for the same reason: smaller
pools that evict contexts before they are asked for again were seen to lose hits in bursts.

More links make a job of the same agents shorter, but not the computing of its last requests, which nothing is loaded
beside. So `one_to_two` and `two_to_two` have as many agents as memory has room for in their stores. Where links have no
limit a round is over too soon to tell systems apart, so `unbound` plays four in each repetition. Where mostly prompts
are computed, a few generated tokens reach a client in one burst, so agents of `low_reuse` generate more.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.compare.schema import Pools, Settings

PAIR = ("sgl_mc", "sgl_mc_both", "dualpath:split")

PRESETS: Mapping[str, Settings] = {
    "smoke": Settings(
        "smoke", "offline", ("sgl_mc", "dualpath:split"), repetitions=1, agents=3, contexts=(1500, 2200),
        longest_tokens=2600, appended_tokens=192, pools=Pools(10_000, 2.0, 10_000, 2.0),
    ),
    "pair": Settings("pair", "offline", PAIR),
    "one_to_two": Settings(
        "one_to_two", "offline", ("sgl_mc", "dualpath:split"), decode_servers=2, agents=24,
        pools=Pools(24_000, 5.0, 36_000, 2.0),
    ),
    "two_to_two": Settings(
        "two_to_two", "offline", ("sgl_mc", "dualpath:split"), prefill_servers=2, decode_servers=2, agents=16,
        pools=Pools(18_000, 6.0, 30_000, 1.6),  # four servers fit into 24 GB beside two stores
    ),
    "half_load": Settings(
        "half_load", "poisson", ("dualpath:shorter_queue", "dualpath:split"), agents=16, load=0.5
    ),
    "unbound": Settings("unbound", "offline", PAIR, rounds=4, snic_mbit=None, cnic_mbit=None),
    "low_reuse": Settings(
        "low_reuse", "offline", PAIR, low_reuse=True, agents=8, longest_tokens=6000, generated_tokens=32,
        pools=Pools(24_000, 4.0, 50_000, 1.9),
    ),
    "lone": Settings(
        "lone", "offline", ("sgl_mc", "dualpath:split"), agents=4, in_flight_per_prefill=1, contexts=(7600, 7600),
        sample_s=0.05,
    ),
    "policies": Settings(
        "policies", "offline",
        ("sgl_mc", "dualpath:prefill", "dualpath:decode", "dualpath:shorter_queue", "dualpath:split"), agents=8,
    ),
    "oracle": Settings("oracle", "offline", ("sgl_mc", "sgl_mc_default", "dualpath:split", "oracle"), repetitions=3),
    "online": Settings("online", "online", ("sgl_mc", "dualpath:split"), repetitions=1, agents=16, passes=3),
}  # fmt: skip
