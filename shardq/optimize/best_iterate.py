"""The best iterate of training, so that a block is never worse than its start."""

from dataclasses import dataclass

from shardq.quant.quantized import QuantizedLinear


@dataclass
class BestIterate:
    """The quantized linears with the lowest loss on samples that training does not see; first those of the start.

    Attributes:
        linears: by name; the codes as they would be written, a byte a weight.
        loss: the loss of these codes on the held-out samples.
    """

    linears: dict[str, QuantizedLinear]
    loss: float

    def offer(self, linears: dict[str, QuantizedLinear], loss: float) -> None:
        """Keep quantized linears if their loss is lower than the lowest so far."""
        if loss < self.loss:
            self.linears, self.loss = linears, loss
