import argparse
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dualpath.config import FLAGS, SWITCH_ENV, DualPathConfig, add_arguments, flags_markdown, read_config
from sglang_dualpath.errors import ConfigError, DualPathError

ON = {"kv_connector": "dualpath"}


def parse(*words, environ=None):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_config(parser.parse_args(words), environ or {})


def test_nothing_given_is_off():
    assert parse() is None
    assert read_config({}, {}) is None
    assert read_config(None, {}) is None


def test_switch_alone_gives_the_defaults():
    assert parse("--kv-connector", "dualpath") == DualPathConfig()


def test_environment_switches_on_without_a_command_line():
    assert read_config(environ={SWITCH_ENV: "dualpath"}) == DualPathConfig()


def test_environment_of_the_process_is_read_when_none_is_given(monkeypatch):
    monkeypatch.setenv(SWITCH_ENV, "dualpath")
    monkeypatch.setenv("SGLANG_DUALPATH_LEASE", "0.5")
    assert read_config() == DualPathConfig(lease_s=0.5)


def test_empty_environment_variable_counts_as_not_set():
    assert read_config({}, {SWITCH_ENV: ""}) is None
    assert read_config(ON, {"SGLANG_DUALPATH_LEASE": ""}) == DualPathConfig()


def test_every_flag_reaches_its_field(tmp_path):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef\n")
    config = parse(
        "--kv-connector=dualpath",
        "--dualpath-policy=decode",
        "--dualpath-chunk-bytes=1MiB",
        "--dualpath-claims-in-flight=3",
        "--dualpath-reader-threads=4",
        "--dualpath-read-rate-limit=5GB",
        "--dualpath-lease=0.5",
        "--dualpath-read-deadline=60",
        "--dualpath-hello-silence=2",
        "--dualpath-reserve-bytes=128 MiB",
        "--dualpath-host=10.0.0.1",
        f"--dualpath-key-file={key}",
        "--dualpath-host-memory=1.5",
    )
    assert config == DualPathConfig(
        policy="decode",
        chunk_bytes=2**20,
        claims_in_flight=3,
        reader_threads=4,
        read_rate_limit_bytes_per_s=5 * 10**9,
        lease_s=0.5,
        read_deadline_s=60,
        hello_silence_s=2,
        reserve_bytes=128 * 2**20,
        host="10.0.0.1",
        key_file=str(key),
        host_memory_ratio=1.5,
    )
    assert config.read_key() == b"0123456789abcdef"


def test_flag_wins_over_its_environment_twin():
    environ = {SWITCH_ENV: "dualpath", "SGLANG_DUALPATH_LEASE": "0.5", "SGLANG_DUALPATH_HOST": "::1"}
    config = parse("--dualpath-lease", "0.25", environ=environ)
    assert config == DualPathConfig(lease_s=0.25, host="::1")


def test_flag_without_the_switch_is_refused():
    with pytest.raises(ConfigError, match=r"^--dualpath-lease needs --kv-connector dualpath beside it\.$"):
        parse("--dualpath-lease", "0.25")


def test_environment_twin_without_the_switch_is_ignored():
    assert read_config({}, {"SGLANG_DUALPATH_LEASE": "nonsense"}) is None


def test_other_connector_is_refused():
    with pytest.raises(ConfigError, match="--kv-connector must be dualpath, the only connector there is, not 'lm'"):
        parse("--kv-connector", "lm")
    with pytest.raises(ConfigError, match="SGLANG_KV_CONNECTOR must be dualpath"):
        read_config({}, {SWITCH_ENV: "1"})


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("policy", "spilt", ": no policy is called 'spilt': use one of prefill, decode, shorter_queue, split"),
        ("policy", "no_such_module:X", ": the module of policy no_such_module:X cannot be imported"),
        ("chunk_bytes", "many", " must be a number of bytes like 4194304 or 4MiB, not 'many'"),
        ("chunk_bytes", "-1", " must be a number of bytes"),
        ("chunk_bytes", "\u00b2", " must be a number of bytes"),
        ("chunk_bytes", "1", " must be between 4096 and 1073741824 bytes, not 1"),
        ("claims_in_flight", "0", " must be between 1 and 64, not 0"),
        ("claims_in_flight", "two", " must be a whole number, not 'two'"),
        ("reader_threads", "1.5", " must be a whole number, not '1.5'"),
        ("read_rate_limit", "fast", " must be a number of bytes"),
        ("lease", "0", " must be between 0.05 and 60 seconds, not 0"),
        ("lease", "nan", " must be between 0.05 and 60 seconds, not nan"),
        ("lease", "soon", " must be a number, not 'soon'"),
        ("read_deadline", "inf", " must be between 1 and 3600 seconds, not inf"),
        ("hello_silence", "-3", " must be between 0.1 and 300 seconds, not -3"),
        ("reserve_bytes", "0", " must be between 4096 and"),
        ("host", "tcp://10.0.0.1", " must be an address or host name of this machine"),
        ("host", "a b", " must be an address or host name of this machine"),
        ("key_file", "  ", " must name a file, not be empty"),
        ("host_memory", "0", " must be between 0.01 and 1000, not 0"),
    ],
)
def test_bad_value_is_refused_in_one_sentence_that_names_what_was_set(name, text, sentence):
    option, env = f"--dualpath-{name.replace('_', '-')}", f"SGLANG_DUALPATH_{name.upper()}"
    for source, arguments, environ in [(option, ON | {f"dualpath_{name}": text}, {}), (env, ON, {env: text})]:
        with pytest.raises(ConfigError) as caught:
            read_config(arguments, environ)
        message = str(caught.value)
        assert message.startswith(source + sentence)
        assert message.endswith(".")
        assert "\n" not in message


def test_reserve_smaller_than_a_chunk_is_refused():
    with pytest.raises(ConfigError, match="--dualpath-reserve-bytes 4096 is less than one chunk of 4194304 bytes"):
        read_config(ON | {"dualpath_reserve_bytes": 4096}, {})


def test_lease_longer_than_the_deadline_is_refused():
    with pytest.raises(ConfigError, match="--dualpath-lease 5 must be shorter than --dualpath-read-deadline 5"):
        read_config(ON | {"dualpath_lease": 5, "dualpath_read_deadline": 5}, {})


def test_key_file_that_is_missing_or_short_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        read_config(ON | {"dualpath_key_file": tmp_path / "none"}, {})
    short = tmp_path / "short"
    short.write_text("secret\n")
    short.chmod(stat.S_IRUSR)
    with pytest.raises(ConfigError, match="holds 6 bytes, a key needs at least 16") as caught:
        read_config(ON | {"dualpath_key_file": short}, {})
    assert "secret" not in str(caught.value)


def test_no_key_file_means_no_key():
    assert DualPathConfig().read_key() is None


def test_config_error_is_one_of_ours_and_a_value_error():
    assert issubclass(ConfigError, DualPathError)
    assert issubclass(ConfigError, ValueError)


configs = st.builds(
    DualPathConfig,
    policy=st.sampled_from(["prefill", "decode", "shorter_queue", "split"]),
    chunk_bytes=st.integers(4096, 2**26),
    claims_in_flight=st.integers(1, 64),
    reader_threads=st.integers(1, 64),
    read_rate_limit_bytes_per_s=st.integers(0, 10**13),
    lease_s=st.floats(0.05, 0.99),
    read_deadline_s=st.floats(1, 3600),
    hello_silence_s=st.floats(0.1, 300),
    reserve_bytes=st.integers(2**26, 2**40),
    host=st.sampled_from([None, "10.0.0.1", "::1", "node-3"]),
    host_memory_ratio=st.floats(0.01, 1000),
)


@given(configs)
def test_child_process_reads_the_same_config_from_the_environment(config):
    assert read_config({}, config.environ()) == config


def test_environment_of_the_defaults_is_the_switch_alone():
    assert DualPathConfig().environ() == {SWITCH_ENV: "dualpath"}


def test_every_field_has_one_flag():
    assert sorted(flag.field for flag in FLAGS) == sorted(DualPathConfig.__struct_fields__)


def test_default_texts_are_the_defaults():
    for flag in FLAGS:
        default = getattr(DualPathConfig(), flag.field)
        if default is not None:
            assert flag.parse(flag.default_text.removesuffix(" (off)")) == default


def test_help_names_default_and_environment_twin():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for flag in FLAGS:
        assert f"{flag.option} {flag.metavar}" in text
        assert flag.env in text


def test_markdown_has_a_row_for_the_switch_and_each_flag():
    lines = flags_markdown().splitlines()
    assert len(lines) == 2 + 1 + len(FLAGS)
    assert all(line.count("|") == 5 for line in lines)


def test_config_is_read_without_sglang_or_torch():
    program = "import sys, sglang_dualpath.config as c; sys.exit(bool({'sglang', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
