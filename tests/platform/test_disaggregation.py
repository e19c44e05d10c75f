import subprocess
import sys
from types import SimpleNamespace

from sglang_cpu_platform.disaggregation import PROGRESS_WAIT_US, waiting_agent

# Prints the CPU seconds that an idle agent took in a second, made as SGLang makes its own.
IDLE_AGENT = """
import sys, time
from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t
from sglang_cpu_platform import disaggregation
if sys.argv[1] == "hooked":
    disaggregation.let_progress_threads_wait()
agent = nixl_agent("idle", nixl_agent_config(backends=[], sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT))
agent.create_backend("UCX", {})
start = time.process_time()
time.sleep(1)
print(time.process_time() - start)
"""


def test_an_agent_is_made_as_before_but_waits():
    made = waiting_agent(lambda name, config: (name, config.pthrDelay))("agent", SimpleNamespace(pthrDelay=0))
    assert made == ("agent", PROGRESS_WAIT_US)


def idle_cpu_s(*arguments):
    command = [sys.executable, "-c", IDLE_AGENT, *arguments]
    environment = {"PATH": "/usr/bin:/bin", "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return float(done.stdout.split()[-1])


def test_an_idle_agent_leaves_the_core_to_others():
    # Half of what one takes that spins, also where it has to share a core.
    assert idle_cpu_s("hooked") < 0.5 * idle_cpu_s("as it comes")
