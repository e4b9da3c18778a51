"""Tables of pointers: kept for what recurs, but not those of a CUDA graph, which only its replays fill."""

from __future__ import annotations

import torch

from ulysses_triton.kernels import _table


def counted():
    made = []

    @_table.kept
    def make(*key):
        made.append(key)
        return _table.table([key], torch.device("cpu"))

    return make, made


def test_a_table_that_recurs_is_made_once():
    make, made = counted()
    assert make(1, 2) is make(1, 2) and make(1, 3) is not make(1, 2)
    assert made == [(1, 2), (1, 3)] and make(1, 2).tolist() == [[1, 2]]


def test_the_latest_tables_are_kept(monkeypatch):
    monkeypatch.setattr(_table, "TABLES", 2)
    make, made = counted()
    for key in (1, 2, 1, 3, 1, 2):  # 3 takes the place of 2, the least recent
        make(key)
    assert made == [(1,), (2,), (3,), (2,)]


def test_what_a_graph_captures_is_its_own(monkeypatch):
    make, made = counted()
    eager = make(1)
    monkeypatch.setattr(_table, "_capturing", lambda: True)
    assert make(1) is eager and make(2) is not make(2)
    monkeypatch.undo()
    make(2)
    assert made == [(1,), (2,), (2,), (2,)]
