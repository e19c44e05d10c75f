"""A cluster on one machine: storage and compute network, store, prefill and decode servers, router.

>>> spec = ClusterSpec(model=identity_model(Path("out/models")), servers=dualpath_pair(), network=NetworkSpec())
>>> with Cluster(spec, log_dir=Path("out/logs")) as cluster:
...     first = cluster.generate(input_ids=prompt, max_new_tokens=16, stream=True)
...     cluster.flush()
...     again = cluster.generate(input_ids=prompt, max_new_tokens=16, stream=True)
...     assert again.output_ids == first.output_ids

Without a network the servers run on 127.0.0.1 with different ports ("loopback"): the same results, no NIC speeds.
`python -m benchmarks.testbed down` removes what a killed run has left behind.
"""

from benchmarks.testbed.client import Client, Generation, greedy_payload
from benchmarks.testbed.cluster import Cluster, ClusterSpec
from benchmarks.testbed.errors import NetworkError, ProcessError, RequestError, RequirementError, TestbedError
from benchmarks.testbed.metrics import difference, metric_sum, parse_metrics
from benchmarks.testbed.model import KV_BYTES_PER_TOKEN, PAGE_TOKENS, identity_model, kv_bytes_per_token, speed_model
from benchmarks.testbed.network import NetworkSpec, missing_requirement
from benchmarks.testbed.servers import ServerSpec, dualpath_pair, stock_pair
from benchmarks.testbed.store import StoreSpec

__all__ = [
    "KV_BYTES_PER_TOKEN",
    "PAGE_TOKENS",
    "Client",
    "Cluster",
    "ClusterSpec",
    "Generation",
    "NetworkError",
    "NetworkSpec",
    "ProcessError",
    "RequestError",
    "RequirementError",
    "ServerSpec",
    "StoreSpec",
    "TestbedError",
    "difference",
    "dualpath_pair",
    "greedy_payload",
    "identity_model",
    "kv_bytes_per_token",
    "metric_sum",
    "missing_requirement",
    "parse_metrics",
    "speed_model",
    "stock_pair",
]
