"""Which iterate is kept."""

from shardq.optimize.best_iterate import BestIterate


def test_lowest_loss_is_kept_and_the_first_of_equals():
    best = BestIterate("start", 1.0)
    seen = []
    for name, loss in (("a", 1.5), ("b", 0.5), ("c", 0.5), ("d", 0.7), ("e", 0.4), ("f", float("nan"))):
        best.offer(name, loss)
        seen.append((best.linears, best.loss))
    assert seen == [("start", 1.0), *[("b", 0.5)] * 3, *[("e", 0.4)] * 2]
