"""SGLang's scheduler, telling the reads when a request arrives and giving them a turn in every iteration."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.scheduler import Scheduler

from sglang_dualpath.connector.rooms import real_room
from sglang_dualpath.scheduler.sides import DecodeSide, PrefillSide, build_side


class DualPathScheduler(Scheduler):
    """Adds one side, prefill or decode; everything else is upstream's."""

    _side: PrefillSide | DecodeSide | None = None

    def init_disaggregation(self) -> None:
        super().init_disaggregation()
        if self.disaggregation_mode != DisaggregationMode.NULL:
            self._side = build_side(self)

    def _prefetch_kvcache(self, req: Any, storage_hit_end: int | None = None) -> Any:
        side = self._side
        if isinstance(side, PrefillSide) and real_room(req) is not None:
            side.arrived(req)
        answer = super()._prefetch_kvcache(req, storage_hit_end)
        if isinstance(side, PrefillSide) and real_room(req) is not None:
            side.looked_up(req)
        return answer

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        super()._add_request_to_queue(req, is_retracted)
        side = self._side
        if isinstance(side, DecodeSide) and not is_retracted and real_room(req) is not None:
            side.added(req)

    def _process_hicache_events(self, *args: Any, **kwargs: Any) -> None:
        super()._process_hicache_events(*args, **kwargs)
        if isinstance(self._side, PrefillSide):
            self._side.tick()
