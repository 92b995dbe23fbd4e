"""Adam with moments of 8 bits, by the library bitsandbytes.

Source: 8-bit optimizers via block-wise quantization, arXiv 2110.02861.
"""

import bitsandbytes
from torch import Tensor


class Adam8(bitsandbytes.optim.Adam8bit):
    """The library's, with the flag that torch's fused optimizers have: while `found_inf` is 1, a step changes nothing.

    Its kernels know no such flag, so the host waits for it; they make the host wait on a GPU anyway.
    """

    found_inf: Tensor

    def step(self, closure: None = None) -> None:
        """Step where the flag allows it."""
        if not self.found_inf.item():
            super().step()
