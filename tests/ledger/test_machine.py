"""Every interleaving of claims, words, leases, suspicion, aborts and late writers; several reads over one reserve."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from sglang_dualpath.ledger import End, Expired, Grant, Refusal, RefusalReason, Reserve, Share

from .model import ModelReader, Read, Token, Writer

POOL_SLOTS = 80
LEASE_S = 1.0
NAMES = ("pe", "de", "helper")
names = st.sampled_from(NAMES)
remote_names = st.sampled_from(NAMES[1:])
limits = st.none() | st.integers(0, 12)
ends = st.sampled_from(End)


class LedgerMachine(RuleBasedStateMachine):
    reads = Bundle("reads")
    writers = Bundle("writers")

    @initialize(spares=st.integers(0, 12))
    def start(self, spares: int) -> None:
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

    # Reads and readers

    @rule(
        target=reads,
        first=st.integers(0, 50),
        pages=st.integers(1, 24),
        beyond_storage=st.integers(0, 6),
        chunk=st.integers(1, 8),
        local=st.builds(Share, ends, limit_pages=limits),
        silent=st.booleans(),
    )
    def open_read(
        self, first: int, pages: int, beyond_storage: int, chunk: int, local: Share, silent: bool
    ) -> Read | None:
        if pages > len(self.free):
            return None
        slots, self.free = self.free[:pages], self.free[pages:]
        read = Read(first, slots, first + max(0, pages - beyond_storage), self.reserve, chunk, key=len(self.open))
        self.open.append(read)
        if not silent:
            self.join(read, "pe", local)
        return read

    @rule(
        read=reads,
        name=remote_names,
        share=st.builds(Share, ends, limit_pages=limits, lease_s=st.just(LEASE_S), exposed=st.just(True)),
    )
    def join_remote(self, read: Read | None, name: str, share: Share) -> None:
        if read is not None:
            self.join(read, name, share)

    def join(self, read: Read, name: str, share: Share) -> None:
        joined = read.ledger.join(name, share, local=not share.exposed)
        complete = read.landed_prefix() == len(read.slots)
        assert joined == (not (read.closed or read.settled_short or complete))
        if joined:
            reader = read.readers.setdefault(name, ModelReader(share, not share.exposed))
            reader.share, reader.active, reader.resting = share, True, False

    @rule(read=reads, name=remote_names, first=st.integers(0, 80), pages=st.integers(0, 20), lease_s=st.floats(0, 2))
    def reserve_range(self, read: Read | None, name: str, first: int, pages: int, lease_s: float) -> None:
        if read is None:
            return
        reader = read.readers.get(name)
        known = read.ledger.reserve_range(name, first, first + pages, until_s=self.now_s + lease_s)
        assert known == (reader is not None and reader.active)
        if known and reader is not None:
            reader.held |= (set(range(first, first + pages)) & set(read.state)) - reader.barred

    @rule(read=reads, name=remote_names)
    def leave(self, read: Read | None, name: str) -> None:
        if read is not None:
            read.ledger.leave(name, now_s=self.now_s)
            if name in read.readers:
                read.left(name)

    # Claims and words

    @rule(target=writers, read=reads, name=names, max_pages=st.none() | st.integers(1, 9))
    def claim(self, read: Read | None, name: str, max_pages: int | None) -> Writer | None:
        return None if read is None else self.claim_for(read, name, max_pages)

    def claim_for(self, read: Read, name: str, max_pages: int | None = None) -> Writer | None:
        reader = read.readers.get(name)
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

    def check_refusal(self, read: Read, name: str, refusal: Refusal) -> None:
        """A refusal without retry must leave nothing that the reader could have claimed; one with retry, a reason."""
        reader = read.readers.get(name)
        match refusal.reason:
            case RefusalReason.CLOSED:
                assert read.closed
            case RefusalReason.UNKNOWN_READER:
                assert reader is None or not reader.active
            case RefusalReason.NO_SPARE:
                assert self.reserve.free == 0
                assert refusal.retry == (self.reserve.size > 0)
            case RefusalReason.MET if not read.settled_short:
                assert reader is not None
                free = [page for page in range(read.first_page, read.failed_from()) if read.state[page] is None]
                assert not any(reader.may_claim(page, read.storage_end) for page in free)

    @precondition(lambda self: self.at_work)
    @rule(writer=writers, offset=st.integers(0, 8))
    def write(self, writer: Writer | None, offset: int) -> None:
        """One page arrives: perhaps in time, perhaps long after the claim was taken away."""
        if writer is not None and writer.grant.claim_id in self.at_work:
            self.write_page(writer, offset % writer.grant.pages)

    def write_page(self, writer: Writer, offset: int) -> None:
        slot, page = writer.grant.slots[offset], writer.grant.first_page + offset
        assert slot not in self.tree, "a write into the prefix cache"
        assert slot not in self.others, "a write into somebody else's memory"
        assert slot not in self.free
        assert slot not in self.reserve.spare_slots(), "a write into a spare slot"
        if writer.taken_away:
            assert slot in self.reserve.exposed_slots()
        else:
            assert writer.read.state[page] is writer
            assert writer.read.slot(page) == slot
        self.memory[slot] = (page, writer.grant.claim_id)

    @rule(writer=consumes(writers), good=st.none() | st.integers(0, 8))
    def last_word(self, writer: Writer | None, good: int | None) -> None:
        if writer is not None and writer.grant.claim_id in self.at_work:
            self.speak(writer, good)

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

    @rule(seconds=st.floats(0.0, 1.5))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(read=reads)
    def expire(self, read: Read | None) -> None:
        if read is None:
            return
        self.take_away(read, read.ledger.expire(now_s=self.now_s))
        for grant in read.ledger.open_grants():
            assert grant.expires_s is None or grant.expires_s > self.now_s

    @rule(read=reads, name=remote_names)
    def revoke(self, read: Read | None, name: str) -> None:
        if read is None:
            return
        if name in read.readers:
            read.left(name)
        self.take_away(read, read.ledger.revoke(name, now_s=self.now_s))
        assert not read.ledger.open_grants(name)

    def take_away(self, read: Read, taken: list[Expired]) -> None:
        for expired in taken:
            assert expired.key in self.reserve.quarantine_keys()
            read.taken_away(expired, self.at_work[expired.grant.claim_id])

    @rule(read=reads, page_count=st.integers(0, 24))
    def ask_whether_settled(self, read: Read | None, page_count: int) -> None:
        if read is None:
            return
        enough = read.landed_prefix() >= min(page_count, len(read.slots))
        settled = read.settled()
        assert read.ledger.settled_through(page_count) == (enough or settled)
        read.settled_short |= settled and not enough and not read.closed

    @rule(read=consumes(reads))
    def abort(self, read: Read | None) -> None:
        if read is not None:
            self.end(read, keep=False)

    @rule(read=consumes(reads))
    def drain(self, read: Read | None) -> None:
        """All readers work as they should from now on: the read settles in as many steps as it has pages."""
        if read is None:
            return
        self.finish_open_claims(read)
        # Each round grants a page, or ends a reader's part, or waits out a reservation.
        for _ in range(3 * len(read.slots) * len(NAMES) + 10):
            if read.ledger.settled:
                break
            self.now_s += LEASE_S / 2
            for name in read.readers:
                writer = None if read.readers[name].resting else self.claim_for(read, name)
                if writer is not None:
                    self.speak(writer, None)
            self.let_the_late_speak()
        assert read.ledger.settled, "a read in which all work does not end"
        self.end(read, keep=True)

    @rule(read=consumes(reads))
    def finish_alone(self, read: Read | None) -> None:
        """All remote readers are lost: the local one finishes what it can, and whatever else landed stays."""
        if read is None:
            return
        for name in NAMES[1:]:
            self.revoke(read, name)
        self.finish_open_claims(read)
        for _ in range(len(read.slots) + 1):
            writer = self.claim_for(read, "pe")
            if writer is None:
                break
            self.speak(writer, None)
        assert read.ledger.settled, "the local reader alone does not end the read"
        local = read.readers.get("pe")
        for page in range(read.first_page, read.first_page + read.landed_prefix() + 1):
            lost = page == read.end_page or page >= read.storage_end or local is None or page in local.barred
            assert read.settled_short or lost or read.landed(page), "a page was lost"
        self.end(read, keep=True)

    def finish_open_claims(self, read: Read) -> None:
        for writer in [w for w in self.at_work.values() if w.read is read and not w.taken_away]:
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
        self.finish_open_claims(read)
        assert read.ledger.open_local_claims() == 0
        assert read.ledger.settled
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

    @precondition(lambda self: self.tree or self.others)
    @rule()
    def evict(self) -> None:
        self.free += [*self.tree, *self.others]
        self.tree, self.others = {}, {}

    @precondition(lambda self: not self.open)
    @rule()
    def flush(self) -> None:
        """The host pool is cleared: all slots are free but those that a late writer may still write to."""
        pool = sorted(set(range(POOL_SLOTS)) - self.reserve.exposed_slots(), reverse=True)
        self.tree, self.others = {}, {}
        self.reserve.reseat(pool[: self.reserve.spares])
        self.free = pool[self.reserve.spares :]

    # What holds at all times

    @invariant()
    def no_slot_is_lost_or_owned_twice(self) -> None:
        reserve = self.reserve
        owned = [*self.free, *self.tree, *self.others, *reserve.spare_slots(), *reserve.exposed_slots()]
        for read in self.open:
            owned += read.slots
        assert sorted(owned) == list(range(POOL_SLOTS))

    @invariant()
    def the_reserve_keeps_its_size_and_its_promises(self) -> None:
        reserve, stats = self.reserve, self.reserve.statistics()
        assert len(reserve.spare_slots()) + len(reserve.exposed_slots()) == reserve.size
        assert stats.free + stats.backing + stats.quarantined == stats.size
        assert stats.free >= 0
        assert stats.swapped_total - stats.released_total == stats.quarantined
        exposed = sum(w.grant.pages for w in self.at_work.values() if w.exposed and not w.taken_away)
        late = sum(w.grant.pages for w in self.at_work.values() if w.taken_away)
        assert (stats.backing, stats.quarantined) == (exposed, late)

    @invariant()
    def what_is_in_the_cache_stays_what_it_was(self) -> None:
        assert all(self.memory[slot] == token for slot, token in self.tree.items())

    @invariant()
    def every_ledger_agrees_with_its_model(self) -> None:
        for read in self.open:
            self.check(read)

    def check(self, read: Read) -> None:
        ledger, stats = read.ledger, read.ledger.statistics()
        open_grants = [w.grant for w in self.at_work.values() if w.read is read and not w.taken_away]
        unclaimed = [page for page, state in read.state.items() if state is None]
        assert ledger.slots == tuple(read.slots)
        assert ledger.landed_prefix() == read.landed_prefix()
        assert list(ledger.open_grants()) == open_grants
        span = (unclaimed[0], unclaimed[-1] + 1) if unclaimed else (read.end_page, read.end_page)
        assert ledger.span_left == span
        assert stats.landed_by_reader == {name: pages for name, pages in read.landed_by.items() if pages}
        assert stats.landed_pages == sum(map(read.landed, read.state)) == sum(read.landed_by.values())
        assert stats.reclaimed_pages == read.faults
        ended = stats.landed_pages + stats.open_pages + stats.reclaimed_pages + stats.abandoned_pages
        assert stats.granted_pages == ended
        assert stats.granted_pages <= stats.pages + read.faults, "read twice without a fault"
        for page, state in read.state.items():
            assert not isinstance(state, tuple) or self.memory[read.slot(page)] == state

    def teardown(self) -> None:
        if not hasattr(self, "reserve"):
            return
        for read in list(self.open):
            self.finish_alone(read)
        self.let_the_late_speak()
        assert not self.at_work
        assert self.reserve.free == self.reserve.size
        self.no_slot_is_lost_or_owned_twice()


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestEveryInterleaving = LedgerMachine.TestCase
