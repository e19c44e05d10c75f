"""Workloads from numbers and from recorded traces, scaled to the largest context that the servers of a testbed take.

Three kinds of source: synthetic agents (the fixed setting, or a row of the DualPath paper's table, arXiv 2602.21548),
recorded coding-agent sessions, and the Mooncake conversation trace, whose prompts share little. Recorded traces name
blocks of content by number; token ids are derived from those names, so equal blocks give equal ids.
"""

from __future__ import annotations

import itertools
import json
import lzma
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.load.workload import Piece, Round, Trajectory, Workload, grow

MOONCAKE_BLOCK_TOKENS = 512
LOW_REUSE_HIT_SHARE = 0.37  # prefix hit rate of the whole Mooncake conversation trace


class TraceError(ValueError):
    """A trace that cannot be read or used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Shape:
    """What a workload is fitted to, in tokens. Contexts of synthetic agents spread evenly over `contexts`."""

    agents: int
    rounds: int = 1
    contexts: tuple[int, int] = (6000, 7600)
    longest_tokens: int = 8000
    appended_tokens: int = 96
    generated_tokens: int = 16
    seed: int = 20260


@dataclass(frozen=True)
class PaperRow:
    """A data set of the paper (its table of traces): means over its 500 trajectories, in tokens."""

    turns: int
    append: int
    generate: int
    total: int
    context: int


PAPER_ROWS: Mapping[str, PaperRow] = {
    "32K": PaperRow(60, 608, 148, 28639, 17183),
    "48K": PaperRow(106, 474, 172, 42607, 25120),
    "64K": PaperRow(157, 429, 176, 55958, 32721),
}


def synthetic(shape: Shape) -> Workload:
    """Agents of the fixed setting: contexts of similar length, a few hundred tokens appended each round."""
    grown = shape.rounds * (shape.appended_tokens + shape.generated_tokens)
    most = shape.longest_tokens - grown  # prompts of the last round end at longest_tokens
    contexts = (min(shape.contexts[0], most), min(shape.contexts[1], most))
    if most < 1:
        raise TraceError(f"{shape.rounds} rounds do not fit into {shape.longest_tokens} tokens: take fewer rounds.")
    trajectories = []
    for agent, context in enumerate(_spread(contexts, shape.agents)):
        trajectories.append(
            grow([Piece(f"a{agent}/context", context)], agent=f"a{agent}", rounds=shape.rounds,
                 appended_tokens=shape.appended_tokens, generated_tokens=shape.generated_tokens)
        )  # fmt: skip
    return Workload("synthetic", tuple(trajectories), shape.seed)


def paper(row_name: str, shape: Shape) -> Workload:
    """Agents with the means of a row of the paper's table, all token counts multiplied so that a whole trajectory fits.

    Agents begin at rounds that spread evenly over a trajectory, as they do once a long job runs.
    """
    if row_name not in PAPER_ROWS:
        raise TraceError(f"The paper has no data set {row_name!r}: take one of {', '.join(PAPER_ROWS)}.")
    row = PAPER_ROWS[row_name]
    scale = shape.longest_tokens / row.total
    appended, generated = max(1, round(row.append * scale)), max(2, round(row.generate * scale))
    last_context = shape.longest_tokens - shape.rounds * (appended + generated) - generated
    if last_context < appended:
        raise TraceError(f"{shape.rounds} rounds do not fit into {shape.longest_tokens} tokens: take fewer rounds.")
    lowest = max(appended, last_context - 2 * round((row.total - row.context) * scale))
    trajectories = [
        grow([Piece(f"a{agent}/context", context)], agent=f"a{agent}", rounds=shape.rounds,
             appended_tokens=appended, generated_tokens=generated)
        for agent, context in enumerate(_spread((lowest, last_context), shape.agents))
    ]  # fmt: skip
    return Workload(f"paper:{row_name}", tuple(trajectories), shape.seed)


def synthetic_low_reuse(shape: Shape) -> Workload:
    """Prompts of which, as in the Mooncake conversation trace, 37 % are hits: two in three share a front part."""
    source = random.Random(f"low-reuse/{shape.seed}")
    trajectories = []
    for agent in range(shape.agents):
        length = source.randrange(shape.longest_tokens // 4, shape.longest_tokens - shape.generated_tokens)
        shared = int(length * LOW_REUSE_HIT_SHARE * 1.5) if agent % 3 else 0
        fill = (Piece(f"a{agent}/context", shared),) if shared else ()
        rest = Piece(f"a{agent}/appended", length - shared)
        trajectories.append(Trajectory(fill, (Round((*fill, rest), shape.generated_tokens),)))
    return Workload("low reuse", tuple(trajectories), shape.seed)


def load(source: str, shape: Shape) -> Workload:
    """A workload from `--trace`: `paper:ROW`, a .jsonl of the Mooncake kind, or coding-agent sessions (.json, .tar).

    Raw files or compressed by xz. Raises TraceError with one sentence when it cannot be used.
    """
    if source.startswith("paper:"):
        return paper(source.removeprefix("paper:"), shape)
    path = Path(source)
    if not path.is_file():
        raise TraceError(f"There is no trace file {source}.")
    name = path.name.removesuffix(".xz")
    if name.endswith(".jsonl"):
        return conversations(_lines(path), shape, name=path.name)
    if name.endswith((".json", ".tar")):
        return sessions(_session_files(path), shape, name=path.name)
    raise TraceError(f"{source} is no trace that is known here: take a .json, .tar or .jsonl file, or one of them .xz.")


class _SessionRequest(msgspec.Struct):
    type: str
    input_tokens: int = msgspec.field(name="in", default=0)
    output_tokens: int = msgspec.field(name="out", default=0)
    hash_ids: list[int] = []


class _Session(msgspec.Struct):
    id: str
    block_size: int
    requests: list[_SessionRequest]


def sessions(files: Iterator[tuple[str, bytes]], shape: Shape, *, name: str) -> Workload:
    """Agents that each play the middle of one recorded session; blocks of equal number are equal content.

    The request before the measured ones is what storage holds. All lengths of an agent are multiplied by one factor, so
    that its longest prompt and what is generated after it make `shape.longest_tokens`: hit shares stay as recorded.
    """
    chosen: list[Trajectory] = []
    for number, (file_name, content) in enumerate(files, start=1):
        session = _decode(content, _Session, f"{name}: {file_name} is no coding-agent session")
        trajectory = _play_middle(session, shape, label=f"s{number}", where=f"{name}: {file_name}")
        if trajectory is not None:
            chosen.append(trajectory)
        if len(chosen) == shape.agents:
            return Workload(name, tuple(chosen), shape.seed)
    raise TraceError(
        f"{name} has {len(chosen)} usable sessions of {shape.rounds + 1} rounds or more that continue one another: "
        f"take at most so many agents (not {shape.agents}), or fewer rounds."
    )


def _play_middle(session: _Session, shape: Shape, *, label: str, where: str) -> Trajectory | None:
    requests = [request for request in session.requests if request.type != "subagent"]
    for request in requests:
        if session.block_size < 1 or request.input_tokens < 1 or request.output_tokens < 0:
            raise TraceError(f"{where} has a request without tokens or a block size that is not positive.")
        if len(request.hash_ids) * session.block_size > request.input_tokens + session.block_size:
            raise TraceError(f"{where} has a request with more blocks than its prompt has tokens.")
    begin = (len(requests) - shape.rounds - 1) // 2
    window = requests[begin : begin + shape.rounds + 1]
    if begin < 0 or len(window) < shape.rounds + 1:
        return None
    if any(after.hash_ids[: len(before.hash_ids) // 2] != before.hash_ids[: len(before.hash_ids) // 2]
           for before, after in itertools.pairwise(window)):  # fmt: skip
        return None  # its context was compacted just here: nothing to load
    longest = max(request.input_tokens + request.output_tokens for request in window)
    scale = min(1.0, shape.longest_tokens / longest)
    prompts = [_blocks(label, index, request.hash_ids, session.block_size, request.input_tokens, scale)
               for index, request in enumerate(window)]  # fmt: skip
    rounds = [Round(prompt, max(2, int(request.output_tokens * scale)))
              for prompt, request in zip(prompts[1:], window[1:], strict=True)]  # fmt: skip
    return Trajectory(prompts[0], tuple(rounds))


def conversations(lines: Iterator[bytes], shape: Shape, *, name: str) -> Workload:
    """Requests of the Mooncake conversation trace; storage holds those front blocks that earlier requests had.

    The measured requests come from behind the first tenth of the trace (at most 2,000 requests), so that there is
    something to reuse. Each is one agent with one round.
    """

    class Line(msgspec.Struct):
        input_length: int
        output_length: int
        hash_ids: list[int]

    requests = []
    for number, text in enumerate(lines, start=1):
        line = _decode(text, Line, f"{name}: line {number} is no request of a Mooncake trace")
        if line.input_length < 1 or not line.hash_ids or line.output_length < 0:
            raise TraceError(f"{name}: line {number} has a request without tokens or blocks.")
        if len(line.hash_ids) != -(-line.input_length // MOONCAKE_BLOCK_TOKENS):
            raise TraceError(f"{name}: line {number} has {len(line.hash_ids)} blocks for {line.input_length} tokens.")
        requests.append(line)
        if len(requests) >= 4000:
            break
    begin = min(len(requests) // 2, 2000)
    seen = {block for line in requests[:begin] for block in line.hash_ids}
    fitting = [line for line in requests[begin:] if line.input_length <= 2 * shape.longest_tokens]
    window = fitting[: shape.agents]
    if len(window) < shape.agents:
        raise TraceError(f"{name} has too few requests of fitting length for {shape.agents} agents: take fewer agents.")
    most = shape.longest_tokens - shape.generated_tokens  # which are not scaled
    scale = min(1.0, most / max(line.input_length for line in window))
    trajectories = []
    for index, line in enumerate(window):
        known = 0
        while known < len(line.hash_ids) and line.hash_ids[known] in seen:
            known += 1
        pieces = _blocks("m", index, line.hash_ids, MOONCAKE_BLOCK_TOKENS, line.input_length, scale)
        # A prompt's last block belongs to it alone, so what is known never reaches its end.
        generated = max(2, min(line.output_length, shape.generated_tokens))
        trajectories.append(Trajectory(pieces[: min(known, len(pieces) - 1)], (Round(pieces, generated),)))
    return Workload(name, tuple(trajectories), shape.seed)


def _blocks(
    label: str, index: int, hash_ids: Sequence[int], block_tokens: int, tokens: int, scale: float
) -> tuple[Piece, ...]:
    """A prompt's pieces: block number n covers the scaled tokens from n to n + 1 blocks; what is left is its own."""
    pieces = []
    at = 0
    for number, block in enumerate(hash_ids, start=1):
        end = int(min(number * block_tokens, tokens) * scale)
        if end > at:
            # A shorter last block is another piece than the whole one.
            whole = number * block_tokens <= tokens
            pieces.append(Piece(f"{label}/{block}" if whole else f"{label}/{block}/{index}", end - at))
            at = end
    if int(tokens * scale) > at:
        pieces.append(Piece(f"{label}/rest/{index}", int(tokens * scale) - at))
    return tuple(pieces)


def _spread(between: tuple[int, int], count: int) -> list[int]:
    """`count` lengths evenly over a range, in an order that mixes short and long ones."""
    low, high = between
    step = (high - low) / max(1, count - 1)
    lengths = [round(low + step * number) for number in range(count)]
    return lengths[::2] + lengths[1::2][::-1]


def _lines(path: Path) -> Iterator[bytes]:
    opener: Callable[..., Any] = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rb") as file:
            for line in file:
                if line.strip():
                    yield line
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise TraceError(f"{path} cannot be read: {error}.") from error


def _session_files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        if path.name.removesuffix(".xz").endswith(".json"):
            content = path.read_bytes()
            yield path.name, lzma.decompress(content) if path.suffix == ".xz" else content
            return
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None and member.name.endswith(".json"):
                    yield member.name, file.read()
    except (OSError, tarfile.TarError, lzma.LZMAError, EOFError) as error:
        kind = "archive" if ".tar" in path.name else "file"  # tarfile's own words take five lines
        raise TraceError(f"{path} cannot be read: the {kind} is damaged or of another kind.") from error


def _decode(content: bytes, kind: type[Any], otherwise: str) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TraceError(f"{otherwise}: {error}.") from error
