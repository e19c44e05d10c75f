"""Every interleaving of claims, words, leases, suspicion, aborts and late writers; several reads over one reserve."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_dualpath.ledger import End, Expired, Grant, Refusal, RefusalReason, Reserve, Share

from .conftest import settled
from .model import ModelReader, Read, Spec, Token, Writer

POOL_SLOTS = 80
LEASE_S = 1.0
NAMES = ("pe", "de", "helper")
names = st.sampled_from(NAMES)
remote_names = st.sampled_from(NAMES[1:])
limits = st.none() | st.integers(0, 12)
ends = st.sampled_from(End)
locals_ = st.builds(Share, ends, limit_pages=limits)
remotes = st.builds(Share, ends, limit_pages=limits, lease_s=st.just(LEASE_S), exposed=st.just(True))
words = st.lists(st.none() | st.integers(0, 4), max_size=12)
"""How many pages of each claim turn out good; all of them where the list ends."""


specs = st.builds(
    Spec,
    st.integers(0, 50),
    st.integers(1, 24),
    st.just(0) | st.integers(0, 6),
    st.integers(1, 8),
    st.dictionaries(st.just("pe"), locals_, max_size=1),
    st.dictionaries(remote_names, remotes, min_size=1),
)
picks = st.integers(0, 11)
"""Which of the open reads, or of the writers at work."""


class LedgerMachine(RuleBasedStateMachine):
    @initialize(spares=st.integers(0, 12), spec=specs)
    def start(self, spares: int, spec: Spec) -> None:
        self.now_s = 0.0
        self.memory: dict[int, Token] = {}
        self.reserve = Reserve(range(spares))
        self.free = list(range(spares, POOL_SLOTS))
        self.open: list[Read] = []
        self.tree: dict[int, Token] = {}
        """Slots that the prefix cache owns, with what must be in them."""
        self.others: dict[int, str] = {}
        """Slots that were freed and are somebody else's now, who wrote into them."""
        self.at_work: dict[int, Writer] = {}
        self.open_read(spec)

    # Reads and readers

    def read(self, pick: int) -> Read:
        return self.open[pick % len(self.open)]

    @precondition(lambda self: len(self.open) < 3)
    @rule(spec=specs)
    def open_read(self, spec: Spec) -> None:
        if spec.pages > len(self.free):
            return
        slots, self.free = self.free[: spec.pages], self.free[spec.pages :]
        storage_end = spec.first_page + max(0, spec.pages - spec.beyond_storage)
        read = Read(spec.first_page, slots, storage_end, self.reserve, spec.chunk_pages)
        self.open.append(read)
        for name, share in {**spec.local, **spec.remotes}.items():
            self.join(read, name, share)

    def join(self, read: Read, name: str, share: Share) -> None:
        joined = read.ledger.join(name, share, local=not share.exposed)
        complete = read.landed_prefix() == len(read.slots)
        assert joined == (not (read.closed or read.settled_short or complete))
        if joined:
            reader = read.readers.setdefault(name, ModelReader(share, not share.exposed))
            reader.share, reader.active, reader.suspended, reader.resting = share, True, False, False

    @precondition(lambda self: self.open)
    @rule(pick=picks, name=remote_names, how=st.sampled_from(["join", "leave", "suspect"]), share=remotes)
    def readers_change(self, pick: int, name: str, how: str, share: Share) -> None:
        read = self.read(pick)
        match how:
            case "join":
                self.join(read, name, share)
            case "leave":
                self.leave(read, name)
            case "suspect":
                self.revoke(read, name)

    def leave(self, read: Read, name: str) -> None:
        read.ledger.leave(name, now_s=self.now_s)
        if name in read.readers:
            read.left(name)

    @precondition(lambda self: self.open)
    @rule(pick=picks, name=remote_names, skip=st.integers(-4, 20), pages=st.integers(1, 20), lease_s=st.floats(0, 2))
    def reserve_range(self, pick: int, name: str, skip: int, pages: int, lease_s: float) -> None:
        read = self.read(pick)
        first = read.first_page + skip
        reader = read.readers.get(name)
        known = read.ledger.reserve_range(name, first, first + pages, until_s=self.now_s + lease_s)
        assert known == (reader is not None and reader.active)
        if known and reader is not None:
            reader.held |= (set(range(first, first + pages)) & set(read.state)) - reader.barred

    # Claims and words

    @precondition(lambda self: self.open)
    @rule(pick=picks, claims=st.lists(st.tuples(names, st.none() | st.integers(1, 9)), min_size=1, max_size=6))
    def claim(self, pick: int, claims: list[tuple[str, int | None]]) -> None:
        for name, max_pages in claims:
            self.claim_for(self.read(pick), name, max_pages)

    def claim_for(self, read: Read, name: str, max_pages: int | None = None) -> Writer | None:
        reader = read.readers.get(name)
        over = read.closed or read.settled_short
        if reader is not None and reader.suspended and not over and not self.owes_a_word(read, name):
            read.comes_back(name)
        waking = reader is not None and reader.active and not read.closed and not read.settled_short
        if reader is not None and waking:
            reader.resting = False
        answer = read.ledger.claim(name, max_pages=max_pages, now_s=self.now_s)
        if isinstance(answer, Grant):
            assert max_pages is None or answer.pages <= max_pages
            assert not read.closed
            assert not read.settled_short
            writer = self.at_work[answer.claim_id] = read.granted(answer)
            return writer
        if reader is not None and waking:
            reader.resting = not answer.retry and not reader.local
        self.check_refusal(read, name, answer)
        return None

    def owes_a_word(self, read: Read, name: str) -> bool:
        return any(w.taken_away and w.read is read and w.grant.reader == name for w in self.at_work.values())

    def check_refusal(self, read: Read, name: str, refusal: Refusal) -> None:
        """A refusal without retry must leave nothing that the reader could have claimed; one with retry, a reason."""
        reader = read.readers.get(name)
        match refusal.reason:
            case RefusalReason.CLOSED:
                assert read.closed
            case RefusalReason.UNKNOWN_READER:
                assert reader is None or not (reader.active or reader.suspended)
            case RefusalReason.LATE:
                assert reader is not None
                assert reader.suspended
                assert refusal.retry
                assert self.owes_a_word(read, name)
            case RefusalReason.NO_SPARE:
                assert self.reserve.free == 0
                assert refusal.retry == (self.reserve.size > 0)
            case RefusalReason.MET if not read.settled_short:
                assert reader is not None
                free = [page for page in range(read.first_page, read.failed_from()) if read.state[page] is None]
                assert not any(reader.may_claim(page, read.storage_end) for page in free)

    @precondition(lambda self: self.at_work)
    @rule(arrivals=st.lists(st.tuples(picks, picks), min_size=1, max_size=6))
    def write(self, arrivals: list[tuple[int, int]]) -> None:
        """Pages arrive: perhaps in time, perhaps long after their claim was taken away."""
        for pick, offset in arrivals:
            writer = self.writer(pick)
            self.write_page(writer, offset % writer.grant.pages)

    def writer(self, pick: int) -> Writer:
        return list(self.at_work.values())[pick % len(self.at_work)]

    def write_page(self, writer: Writer, offset: int) -> None:
        slot, page = writer.grant.slots[offset], writer.grant.first_page + offset
        assert slot not in self.tree, "a write into the prefix cache"
        assert slot not in self.others, "a write into somebody else's memory"
        assert slot not in self.free
        assert slot not in self.reserve._spares, "a write into a spare slot"
        if writer.taken_away:
            assert slot in self.reserve.exposed_slots()
        else:
            assert writer.read.state[page] is writer
            assert writer.read.slot(page) == slot
        self.memory[slot] = (page, writer.grant.claim_id)

    @precondition(lambda self: self.at_work)
    @rule(words=st.lists(st.tuples(picks, st.none() | st.integers(0, 4)), min_size=1, max_size=4))
    def last_words(self, words: list[tuple[int, int | None]]) -> None:
        for pick, good in words[: len(self.at_work)]:
            self.speak(self.writer(pick), good)

    def speak(self, writer: Writer, good: int | None) -> None:
        """The writer writes its good pages (again, and with a page more than it vouches for), says so, and ends."""
        read, grant = writer.read, writer.grant
        pages = grant.pages if good is None else min(good, grant.pages)
        for offset in range(min(pages + 1, grant.pages)):
            self.write_page(writer, offset)
        del self.at_work[grant.claim_id]
        if good == 0:
            landed = read.ledger.fail(grant.claim_id, now_s=self.now_s)
        else:
            landed = read.ledger.land(grant.claim_id, good_pages=None if good is None else pages, now_s=self.now_s)
        assert landed.grant == grant
        assert landed.late == writer.taken_away
        if landed.late:
            assert read.ledger.settle_late(grant.claim_id) == grant.pages
        elif not read.closed:
            assert landed.pages == pages
            for page in range(grant.first_page, grant.first_page + pages):
                read.state[page] = (page, grant.claim_id)
            read.landed_by[grant.reader] = read.landed_by.get(grant.reader, 0) + pages
            read.reclaimed(grant, grant.first_page + pages)
        assert read.ledger.land(grant.claim_id, now_s=self.now_s).grant is None, "a word counted twice"

    # Time, suspicion, the end

    @precondition(lambda self: self.open)
    @rule(pick=picks, seconds=st.floats(0.0, 1.5))
    def time_passes(self, pick: int, seconds: float) -> None:
        self.now_s += seconds
        self.expire(self.read(pick))

    def expire(self, read: Read) -> None:
        self.take_away(read, read.ledger.expire(now_s=self.now_s))
        for grant in read.ledger.open_grants():
            assert grant.expires_s is None or grant.expires_s > self.now_s

    def revoke(self, read: Read, name: str) -> None:
        if name in read.readers:
            read.left(name)
        self.take_away(read, read.ledger.revoke(name, now_s=self.now_s))
        assert all(grant.reader != name for grant in read.ledger.open_grants())

    def take_away(self, read: Read, taken: list[Expired]) -> None:
        for expired in taken:
            assert self.reserve.exposed_slots().issuperset(expired.swap.old_slots)
            read.taken_away(expired, self.at_work[expired.grant.claim_id])

    @precondition(lambda self: self.open)
    @rule(pick=picks, page_count=st.integers(0, 24))
    def ask_whether_settled(self, pick: int, page_count: int) -> None:
        read = self.read(pick)
        enough = read.landed_prefix() >= min(page_count, len(read.slots))
        over = read.settled()
        assert read.ledger.settled_through(page_count) == (enough or over)
        read.settled_short |= over and not enough and not read.closed

    @precondition(lambda self: self.open)
    @rule(pick=picks, how=st.sampled_from(["abort", "short", "drain", "alone"]), goods=words)
    def end_read(self, pick: int, how: str, goods: list[int | None]) -> None:
        read = self.read(pick)
        match how:
            case "abort":
                self.end(read, keep=False)
            case "short":
                self.end(read, keep=True)
            case "drain":
                self.drain(read, goods)
            case "alone":
                self.finish_alone(read, goods)

    def drain(self, read: Read, goods: list[int | None]) -> None:
        """All readers answer from now on, if not always well: the read settles in steps bounded by its pages."""
        self.finish_open_claims(read)
        # Each round grants a page, or ends a reader's part, or waits out a reservation.
        for _ in range(3 * len(read.slots) * len(NAMES) + 10):
            if settled(read.ledger):
                break
            self.now_s += LEASE_S / 2
            for name in read.readers:
                writer = None if read.readers[name].resting else self.claim_for(read, name)
                if writer is not None:
                    self.speak(writer, goods.pop() if goods else None)
            # Others may hold all spares for at most a lease, and then until their last word.
            for other in self.open:
                self.expire(other)
            self.let_the_late_speak()
        assert settled(read.ledger), "a read in which all work does not end"
        self.end(read, keep=True)

    def finish_alone(self, read: Read, goods: list[int | None]) -> None:
        """All remote readers are lost: the local one finishes what it can, and whatever else landed stays."""
        for name in NAMES[1:]:
            self.revoke(read, name)
        self.finish_open_claims(read)
        for _ in range(len(read.slots) + 1):
            writer = self.claim_for(read, "pe")
            if writer is None:
                break
            self.speak(writer, goods.pop() if goods else None)
        assert settled(read.ledger), "the local reader alone does not end the read"
        local = read.readers.get("pe")
        for page in range(read.first_page, read.first_page + read.landed_prefix() + 1):
            lost = page == read.end_page or page >= read.storage_end or local is None or page in local.barred
            assert read.settled_short or lost or read.landed(page), "a page was lost"
        self.end(read, keep=True)

    def open_writers(self, read: Read) -> list[Writer]:
        return [writer for writer in self.at_work.values() if writer.read is read and not writer.taken_away]

    def finish_open_claims(self, read: Read) -> None:
        for writer in self.open_writers(read):
            self.speak(writer, None)

    def let_the_late_speak(self) -> None:
        for writer in [w for w in self.at_work.values() if w.taken_away]:
            self.speak(writer, None)

    def end(self, read: Read, *, keep: bool) -> None:
        """Close; wait for the local claims; the landed prefix goes to the cache, the rest to somebody else."""
        prefix = read.landed_prefix()
        read.closed = True
        self.take_away(read, read.ledger.close(now_s=self.now_s))
        assert read.ledger.close(now_s=self.now_s) == []
        assert not any(writer.exposed for writer in self.open_writers(read)), "a remote writer outlives the close"
        assert read.ledger.open_local_claims() == len(self.open_writers(read))
        self.finish_open_claims(read)
        assert read.ledger.open_local_claims() == 0
        assert settled(read.ledger)
        assert read.ledger.landed_prefix() == prefix
        self.check(read)
        self.open.remove(read)
        for index, slot in enumerate(read.slots):
            page = read.first_page + index
            if keep and index < prefix:
                self.tree[slot] = self.memory[slot]
                assert self.tree[slot] == read.state[page], "a landed page does not hold what its reader wrote"
            else:
                self.others[slot] = f"after page {page}"
                self.memory.pop(slot, None)

    @rule()
    def evict(self) -> None:
        """Slots go back to the pool. With no read open, it is cleared: all slots but the exposed ones are free."""
        if self.open:
            self.free += [*self.tree, *self.others]
        else:
            pool = sorted(set(range(POOL_SLOTS)) - self.reserve.exposed_slots(), reverse=True)
            self.reserve.reseat(pool[: self.reserve.spares])
            self.free = pool[self.reserve.spares :]
        self.tree, self.others = {}, {}

    # What holds at all times

    @invariant()
    def no_slot_is_lost_or_owned_twice(self) -> None:
        reserve = self.reserve
        owned = [*self.free, *self.tree, *self.others, *reserve._spares, *reserve.exposed_slots()]
        for read in self.open:
            owned += read.slots
        assert sorted(owned) == list(range(POOL_SLOTS))

    @invariant()
    def the_reserve_keeps_its_size_and_its_promises(self) -> None:
        reserve = self.reserve
        assert reserve.spares + len(reserve.exposed_slots()) == reserve.size
        assert reserve.free + reserve.backing + reserve.quarantined == reserve.size
        assert reserve.free >= 0
        exposed = sum(w.grant.pages for w in self.at_work.values() if w.exposed and not w.taken_away)
        late = sum(w.grant.pages for w in self.at_work.values() if w.taken_away)
        assert (reserve.backing, reserve.quarantined) == (exposed, late)

    @invariant()
    def what_is_in_the_cache_stays_what_it_was(self) -> None:
        assert all(self.memory[slot] == token for slot, token in self.tree.items())

    @invariant()
    def every_ledger_agrees_with_its_model(self) -> None:
        for read in self.open:
            self.check(read)

    def check(self, read: Read) -> None:
        ledger, stats = read.ledger, read.ledger.statistics()
        open_grants = [writer.grant for writer in self.open_writers(read)]
        unclaimed = [page for page, state in read.state.items() if state is None]
        assert ledger.slots == tuple(read.slots)
        assert ledger.landed_prefix() == read.landed_prefix()
        assert list(ledger.open_grants()) == open_grants
        span = (unclaimed[0], unclaimed[-1] + 1) if unclaimed else (read.end_page, read.end_page)
        assert ledger.span_left == span
        assert stats.landed_by_reader == {name: pages for name, pages in read.landed_by.items() if pages}
        assert stats.landed_pages == sum(map(read.landed, read.state)) == sum(read.landed_by.values())
        assert stats.reclaimed_pages == read.faults
        for name, reader in read.readers.items():
            assert ledger.counts_on(name) == (reader.active and not reader.resting)
        ended = stats.landed_pages + stats.open_pages + stats.reclaimed_pages + stats.abandoned_pages
        assert stats.granted_pages == ended
        assert stats.granted_pages <= stats.pages + read.faults, "read twice without a fault"
        for page, state in read.state.items():
            assert not isinstance(state, tuple) or self.memory[read.slot(page)] == state

    def teardown(self) -> None:
        if not hasattr(self, "reserve"):
            return
        for read in list(self.open):
            self.finish_alone(read, [])
        self.let_the_late_speak()
        assert not self.at_work
        assert self.reserve.free == self.reserve.size
        self.no_slot_is_lost_or_owned_twice()


LedgerMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestEveryInterleaving = LedgerMachine.TestCase
