"""Times, percentiles and the intervals of ratios."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.load.measures import Record, bootstrap_ratio, latencies, median, percentile, ratio_of_medians


def record(**changes: object) -> Record:
    fields: dict[str, object] = {"agent": 0, "round": 0, "sent_s": 1.0, "first_s": 3.0, "second_s": 3.5, "last_s": 5.0,
                                 "prompt_tokens": 90, "output_tokens": 5}  # fmt: skip
    return Record(**(fields | changes))  # type: ignore[arg-type]


def test_times_of_a_record_count_from_sending() -> None:
    one = record()
    assert (one.ttft_s, one.ttst_s, one.tpot_s) == (2.0, 2.5, 0.5)


def test_a_request_without_a_second_token_has_no_time_per_token() -> None:
    one = record(output_tokens=1, second_s=None)
    assert one.tpot_s is None
    assert one.ttst_s is None


def test_throughput_counts_prompt_and_generated_tokens_until_the_last_one() -> None:
    found = latencies([record(), record(last_s=10.0)])
    assert found.jct_s == 10.0
    assert found.throughput_tokens_per_s == pytest.approx(19.0)


def test_failed_requests_do_not_count() -> None:
    found = latencies([record(), record(first_s=9.0, last_s=99.0, error="lost")])
    assert found.jct_s == 5.0
    assert found.ttft_p99_s == 2.0


def test_nothing_measured_is_none_and_not_zero() -> None:
    found = latencies([])
    assert found.ttft_p50_s is None
    assert percentile([], 50) is None
    assert median([None]) is None
    assert ratio_of_medians([1.0], []) is None
    assert ratio_of_medians([1.0], [0.0]) is None


def test_a_percentile_lies_between_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    source = np.random.default_rng(7)
    inside = 0
    for number in range(100):
        above = source.normal(19.0, 0.5, 9)
        below = source.normal(10.0, 0.3, 9)
        interval = bootstrap_ratio(list(above), list(below), resamples=2000, seed=number)
        assert interval is not None
        inside += interval[0] <= 1.9 <= interval[1]
    assert inside >= 85


@pytest.mark.parametrize("paired", [False, True])
def test_what_both_sides_share_widens_the_interval_of_unpaired_values_alone(paired: bool) -> None:
    shared = [1.0, 2.0, 3.0, 4.0, 5.0]
    interval = bootstrap_ratio([2 * value for value in shared], shared, paired=paired)
    assert interval is not None
    assert (interval[0] == pytest.approx(interval[1]) == pytest.approx(2.0)) is paired


def test_the_interval_of_paired_values_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    source = np.random.default_rng(8)
    inside = 0
    for number in range(100):
        shared = source.normal(10.0, 3.0, 9)
        above = 1.9 * shared + source.normal(0.0, 0.5, 9)
        interval = bootstrap_ratio(list(above), list(shared), paired=True, resamples=2000, seed=number)
        assert interval is not None
        inside += interval[0] <= 1.9 <= interval[1]
    assert inside >= 85


def test_the_same_values_give_the_same_interval() -> None:
    values = ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9])
    assert bootstrap_ratio(*values) == bootstrap_ratio(*values)


def test_values_that_do_not_vary_have_an_interval_of_no_width() -> None:
    assert bootstrap_ratio([4.0, 4.0], [2.0, 2.0]) == (2.0, 2.0)


def test_values_without_a_partner_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap_ratio([1.0, 2.0], [1.0, 2.0, 3.0], paired=True)


def test_one_value_has_no_interval() -> None:
    assert bootstrap_ratio([1.0], [1.0, 2.0]) is None
