"""Which iterate is kept, and for how long nothing better has been seen."""

from shardq.optimize.best_iterate import BestIterate


def test_lowest_loss_is_kept_and_stale_looks_are_counted():
    best = BestIterate("start", 1.0)
    seen = []
    for name, loss in (("a", 1.5), ("b", 0.5), ("c", 0.5), ("d", 0.7), ("e", 0.4), ("f", float("nan"))):
        best.offer(name, loss)
        seen.append((best.linears, best.loss, best.num_stale))
    assert seen == [("start", 1.0, 1), ("b", 0.5, 0), ("b", 0.5, 1), ("b", 0.5, 2), ("e", 0.4, 0), ("e", 0.4, 1)]
