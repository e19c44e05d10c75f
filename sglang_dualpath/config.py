"""Every setting in one table: the command line's flags, their environment twins and the README's list come from it.

`--kv-connector dualpath` is the switch; `--dualpath-*` tune it, each with a default that needs no tuning. A flag wins
over its environment twin, which wins over the default. The twins are for servers that are started without a command
line (`sglang.Engine(...)`) and carry the settings to a server's child processes. Does not import sglang.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from sglang_dualpath.errors import ConfigError
from sglang_dualpath.policy import DEFAULT_CHUNK_BYTES, DEFAULT_POLICY, PolicyError, load_policy

SWITCH_FLAG = "--kv-connector"
SWITCH_ENV = "SGLANG_KV_CONNECTOR"
SWITCH_DEST = "kv_connector"
SWITCH_VALUE = "dualpath"

MIN_KEY_BYTES = 16
"""Shorter keys can be guessed; 16 random bytes are as much as a 128-bit cipher has."""

_KIB, _MIB, _GIB = 1024, 1024**2, 1024**3
_BYTE_UNITS = {"KIB": _KIB, "MIB": _MIB, "GIB": _GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}

Value = str | int | float | None


class DualPathConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of one server, checked. Build it by `read_config`, which checks; this class does not."""

    policy: str = DEFAULT_POLICY
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    claims_in_flight: int = 2
    reader_threads: int = 2
    read_rate_limit_bytes_per_s: int = 0
    lease_s: float = 1.0
    read_deadline_s: float = 120.0
    hello_silence_s: float = 3.0
    reserve_bytes: int = 64 * _MIB
    host: str | None = None
    key_file: str | None = None
    host_memory_ratio: float = 2.0

    def environ(self) -> dict[str, str]:
        """Environment twins from which `read_config` makes an equal config in a child process, the switch included.

        Settings that are at their default are left out.
        """
        default = DualPathConfig()
        values = {flag: getattr(self, flag.field) for flag in FLAGS}
        changed = {flag.env: str(value) for flag, value in values.items() if value != getattr(default, flag.field)}
        return {SWITCH_ENV: SWITCH_VALUE} | changed

    def read_key(self) -> bytes | None:
        """The key that messages are authenticated with, None without a key file. Raises ConfigError if unusable."""
        if self.key_file is None:
            return None
        try:
            key = Path(self.key_file).read_bytes().strip()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(f"--dualpath-key-file: {self.key_file} cannot be read: {reason}.") from error
        if len(key) < MIN_KEY_BYTES:
            raise ConfigError(
                f"--dualpath-key-file: {self.key_file} holds {len(key)} bytes, a key needs at least {MIN_KEY_BYTES}."
            )
        return key


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """One setting. `parse` takes what was given as text and raises ValueError with the rest of a sentence."""

    name: str
    """Without the prefix: `lease` is `--dualpath-lease` and `SGLANG_DUALPATH_LEASE`."""
    field: str
    """Attribute of DualPathConfig."""
    metavar: str
    parse: Callable[[str], Value]
    help: str
    default_text: str

    @property
    def option(self) -> str:
        return f"--dualpath-{self.name}"

    @property
    def env(self) -> str:
        return f"SGLANG_DUALPATH_{self.name.upper().replace('-', '_')}"

    @property
    def dest(self) -> str:
        return f"dualpath_{self.name.replace('-', '_')}"


def _bytes_between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        unit = next((unit for unit in _BYTE_UNITS if text.strip().upper().endswith(unit)), "")
        number = text.strip()[: len(text.strip()) - len(unit)].strip()
        if not (number.isascii() and number.isdigit() and len(number) <= 20):
            raise ValueError(f"must be a number of bytes like 4194304 or 4MiB, not {text!r}")
        value = int(number) * _BYTE_UNITS.get(unit, 1)
        if not low <= value <= high:
            raise ValueError(f"must be between {low} and {high} bytes, not {text}")
        return value

    return parse


def _integer_between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"must be a whole number, not {text!r}") from None
        if not low <= value <= high:
            raise ValueError(f"must be between {low} and {high}, not {text}")
        return value

    return parse


def _number_between(low: float, high: float, unit: str = "") -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"must be a number, not {text!r}") from None
        if not low <= value <= high:  # also false for nan
            raise ValueError(f"must be between {low:g} and {high:g}{unit}, not {text}")
        return value

    return parse


def _policy(text: str) -> str:
    load_policy(text)  # PolicyError is a ValueError whose text says it all
    return text


def _host(text: str) -> str:
    if not text or "/" in text or text != text.strip() or any(character.isspace() for character in text):
        raise ValueError(f"must be an address or host name of this machine, without scheme, not {text!r}")
    return text


def _path(text: str) -> str:
    if not text.strip():
        raise ValueError("must name a file, not be empty")
    return text


FLAGS: tuple[Flag, ...] = (
    Flag(
        name="policy",
        field="policy",
        metavar="NAME",
        parse=_policy,
        default_text=DEFAULT_POLICY,
        help="Who reads a request: prefill, decode, shorter_queue, split, a name that a package registers, or "
        "package.module:Class. The prefill server's counts.",
    ),
    Flag(
        name="chunk-bytes",
        field="chunk_bytes",
        metavar="BYTES",
        parse=_bytes_between(4 * _KIB, _GIB),
        default_text="4MiB",
        help="Payload that a reader claims, reads and pushes at a time, at least one page.",
    ),
    Flag(
        name="claims-in-flight",
        field="claims_in_flight",
        metavar="N",
        parse=_integer_between(1, 64),
        default_text="2",
        help="Chunks of one request that a decode engine may hold at once: reads one while it pushes another.",
    ),
    Flag(
        name="reader-threads",
        field="reader_threads",
        metavar="N",
        parse=_integer_between(1, 64),
        default_text="2",
        help="Threads per engine that read from storage, with one storage client: while one asks for its next chunk, "
        "the other keeps the NIC busy. One with backends other than mooncake and file.",
    ),
    Flag(
        name="read-rate-limit",
        field="read_rate_limit_bytes_per_s",
        metavar="BYTES_PER_S",
        parse=_bytes_between(0, 10**13),
        default_text="0 (off)",
        help="Bytes per second that this server reads from storage at most; 0: no limit.",
    ),
    Flag(
        name="lease",
        field="lease_s",
        metavar="SECONDS",
        parse=_number_between(0.05, 60, " seconds"),
        default_text="1.0",
        help="Time a decode engine has for one claim before others take it over. One frozen decode server delays a "
        "request by at most this.",
    ),
    Flag(
        name="read-deadline",
        field="read_deadline_s",
        metavar="SECONDS",
        parse=_number_between(1, 3600, " seconds"),
        default_text="120",
        help="Time from a request's arrival in which its read must end; what is missing then is computed again.",
    ),
    Flag(
        name="hello-silence",
        field="hello_silence_s",
        metavar="SECONDS",
        parse=_number_between(0.1, 300, " seconds"),
        default_text="3.0",
        help="How long a server waits for a sign of life of the other one before it goes on alone.",
    ),
    Flag(
        name="reserve-bytes",
        field="reserve_bytes",
        metavar="BYTES",
        parse=_bytes_between(4 * _KIB, 1024 * _GIB),
        default_text="64MiB",
        help="Host memory per prefill engine that is set aside at start, so that a late write never meets a page in "
        "use. It bounds what decode engines may claim at once.",
    ),
    Flag(
        name="host",
        field="host",
        metavar="ADDRESS",
        parse=_host,
        default_text="SGLang's",
        help="Address that the control socket binds. Default: the one that SGLang's KV manager binds.",
    ),
    Flag(
        name="key-file",
        field="key_file",
        metavar="FILE",
        parse=_path,
        default_text="none",
        help=f"File with a secret of at least {MIN_KEY_BYTES} bytes, the same on all servers, by which control "
        "messages are authenticated. Without it they are only validated.",
    ),
    Flag(
        name="host-memory",
        field="host_memory_ratio",
        metavar="RATIO",
        parse=_number_between(0.01, 1000),
        default_text="2.0",
        help="Size of a decode server's host pool as a multiple of its device pool, where neither --hicache-ratio nor "
        "--hicache-size says.",
    ),
)

SWITCH_HELP = "Load KV cache from storage over the storage NICs of the prefill and the decode server."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the switch and all flags to SGLang's parser, under a heading of their own.

    Values stay text here: argparse would print SGLang's whole usage before the one sentence that matters.
    """
    group = parser.add_argument_group("DualPath")
    group.add_argument(
        SWITCH_FLAG, dest=SWITCH_DEST, metavar=f"{{{SWITCH_VALUE}}}", help=f"{SWITCH_HELP} [env {SWITCH_ENV}]"
    )
    for flag in FLAGS:
        text = f"{flag.help} (default: {flag.default_text}) [env {flag.env}]".replace("%", "%%")
        group.add_argument(flag.option, dest=flag.dest, metavar=flag.metavar, help=text)


def read_config(
    arguments: Mapping[str, object] | argparse.Namespace | None = None, environ: Mapping[str, str] | None = None
) -> DualPathConfig | None:
    """Return this server's settings, or None where DualPath is not switched on.

    `arguments` holds what `add_arguments` parsed, or nothing (a child process, an Engine); attributes it lacks count
    as not given. `environ` is this process's environment when None. Raises ConfigError.
    """
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else dict(arguments or {})
    environ = os.environ if environ is None else environ
    if not _is_switched_on(given, environ):
        stray = [flag.option for flag in FLAGS if given.get(flag.dest) is not None]
        if stray:
            raise ConfigError(f"{stray[0]} needs {SWITCH_FLAG} {SWITCH_VALUE} beside it.")
        return None
    settings: dict[str, Value] = {}
    for flag in FLAGS:
        source, text = _given(flag.option, flag.dest, flag.env, given, environ)
        if text is None:
            continue
        try:
            settings[flag.field] = flag.parse(text)
        except PolicyError as error:
            raise ConfigError(f"{source}: {error}.") from error
        except ValueError as error:
            raise ConfigError(f"{source} {error}.") from None
    config = msgspec.convert(settings, DualPathConfig)
    _check_together(config)
    return config


def _is_switched_on(given: Mapping[str, object], environ: Mapping[str, str]) -> bool:
    source, text = _given(SWITCH_FLAG, SWITCH_DEST, SWITCH_ENV, given, environ)
    if text is None:
        return False
    if text != SWITCH_VALUE:
        raise ConfigError(f"{source} must be {SWITCH_VALUE}, the only connector there is, not {text!r}.")
    return True


def _given(
    option: str, dest: str, env: str, given: Mapping[str, object], environ: Mapping[str, str]
) -> tuple[str, str | None]:
    """What was set, and the name of what set it. An empty environment variable counts as not set."""
    value = given.get(dest)
    if value is not None:
        return option, str(value)
    return env, environ.get(env) or None


def _check_together(config: DualPathConfig) -> None:
    if config.reserve_bytes < config.chunk_bytes:
        raise ConfigError(
            f"--dualpath-reserve-bytes {config.reserve_bytes} is less than one chunk of {config.chunk_bytes} bytes, so "
            "no decode server could claim any: raise it, or lower --dualpath-chunk-bytes."
        )
    if config.lease_s >= config.read_deadline_s:
        raise ConfigError(
            f"--dualpath-lease {config.lease_s:g} must be shorter than --dualpath-read-deadline "
            f"{config.read_deadline_s:g}, or a frozen decode server would use up a whole read."
        )
    config.read_key()


def flag_rows() -> list[tuple[str, str, str, str]]:
    """Rows (flag, default, environment twin, what it does) of the switch and all flags, for tables."""
    switch = (f"{SWITCH_FLAG} {SWITCH_VALUE}", "off", SWITCH_ENV, SWITCH_HELP)
    return [switch, *((f"{flag.option} {flag.metavar}", flag.default_text, flag.env, flag.help) for flag in FLAGS)]


def flags_markdown() -> str:
    """The README's table of flags."""
    lines = ["| flag | default | environment | what it does |", "|---|---|---|---|"]
    lines += [f"| `{flag}` | {default} | `{env}` | {text} |" for flag, default, env, text in flag_rows()]
    return "\n".join(lines) + "\n"
