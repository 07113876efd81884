"""A block is lent to one borrower at a time; tests/test_pythons.py asks the same of every Python that is here."""

import threading

from turnout.run.pool import Pool


def test_what_is_held_is_never_lent():
    pool = Pool(bytearray, patience=4)
    held = [pool.lend(100) for _ in range(10)]
    assert len({id(loan.obj) for loan in held}) == 10
    assert pool.idle_bytes == 0


def test_a_size_takes_a_block_of_up_to_an_eighth_more():
    pool = Pool(bytearray, patience=4)
    block = pool.lend(1000).obj
    assert pool.lend(880).obj is not block, "an eighth of 880 more is 990"
    assert pool.lend(900).obj is block


def test_idle_blocks_go_back():
    pool = Pool(bytearray, patience=3)
    pool.lend(1 << 20)
    for _ in range(3):
        pool.lend(8)
        assert pool.idle_bytes >= 1 << 20
    for _ in range(3):
        pool.lend(8)
    assert pool.idle_bytes < 1 << 20


def test_a_loan_may_end_inside_of_lend():
    """As when garbage is collected there: no lock is taken that the end of a loan would wait for."""
    pool, held = Pool(lambda size: (held.clear(), bytearray(size))[1], patience=4), []
    held.append(pool.lend(10))
    done = threading.Thread(target=lambda: pool.lend(50), daemon=True)
    done.start()
    done.join(10)
    assert not done.is_alive() and pool.idle_bytes == 60
