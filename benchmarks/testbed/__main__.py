"""`python -m benchmarks.testbed up|down|status`: clusters on this machine that stay up until they are told to end."""

from benchmarks.testbed.commands import app

if __name__ == "__main__":
    app(prog_name="python -m benchmarks.testbed")
