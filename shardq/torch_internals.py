"""Private parts of torch that the package uses, with the reason for each; checked with torch 2.13.

Two private parts are used elsewhere: the compiler in `compiling`, the tracer in `model.graph`.
"""

from torch import Tensor, nn, optim
from torch._utils import _flatten_dense_tensors as flattened  # unlike torch.cat, copies nothing where there is one
from torch._utils import _unflatten_dense_tensors as unflattened

# Nested arguments as a flat list and back; torch has no public functions for it.
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map_only, tree_unflatten

__all__ = ["flattened", "unflattened", "keystr", "tree_flatten", "tree_flatten_with_path", "tree_leaves",
           "tree_map_only", "tree_unflatten"]  # fmt: skip


def storage_key(tensor: Tensor) -> int:
    """A number that is equal for tensors that share storage; on the meta device `data_ptr` is always 0."""
    return tensor.untyped_storage()._cdata


def non_persistent_buffers(module: nn.Module) -> list[str]:
    """Names of a module's own buffers that its state dict leaves out; nothing public tells them."""
    return [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]


def allow_fused_on_gpu(optimizer: optim.Adagrad) -> None:
    """Skip Adagrad's check that its fused parameters are on a CPU: the kernel for GPUs exists too."""
    optimizer._need_device_dtype_check_for_fused = False
