"""`python -m benchmarks.chat` against the served page: it counts what is lost or mixed up."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from benchmarks.chat import QUESTIONS, Visit, attempt, compare, visit, write_scans


def test_sessions_at_the_same_time_get_the_answers_that_each_gets_alone(server, tmp_path) -> None:
    scans = write_scans(tmp_path, 3, detail=0.3)
    alone = [visit(server.address, scan) for scan in scans]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda scan: attempt(server.address, scan), scans))
    found = compare(alone, together)
    assert (found["sessions"], found["answers"], found["lost"], found["mixed_up"]) == (3, 3 * len(QUESTIONS), 0, 0)
    assert 0 < found["first_words_alone"] < found["visit_alone"] and len({one.size for one in alone}) == 3


def test_what_is_lost_or_mixed_up_is_counted() -> None:
    one = Visit("10 x 20 x 30", ["done: a", "done: b", "done: c"], [1.0, 2.0, 3.0], 7.0)
    other = replace(one, size="11 x 20 x 30", answers=["done: a", "done: c", "stopped: c"])
    found = compare([one, one, one], [one, other, None])
    assert (found["lost"], found["mixed_up"]) == (len(QUESTIONS) + 1, 3)
    assert found["first_words_together"] == 2.0
