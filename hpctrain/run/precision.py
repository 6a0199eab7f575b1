"""Converts a model to its job's device and precision, and changes nothing else about it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hpctrain.errors import ModelError


def bring(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model on `device`, with its trainable parameters in `dtype`.

    Buffers and frozen parameters are converted, too, if a trainable parameter had their dtype, so that all take part in
    the same arithmetic (such as batch norm's running means). Other dtypes are taken as deliberate and stay: float64 in
    a float32 model, complex and integer values. Tensors whose elements share memory (`expand`) get memory of their own;
    a tensor with two names keeps both. Raises ModelError, naming the tensor, if it cannot be trained or saved.
    """
    _check(model)
    casts = {p.dtype for p in model.parameters() if p.requires_grad}
    done: dict[int, tuple[Tensor, Tensor]] = {}  # the key tensor is kept, so that its id is not reused

    def convert(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            own = tensor.clone(memory_format=torch.contiguous_format) if _overlaps(tensor) else tensor
            done[id(tensor)] = tensor, own.to(device=device, dtype=dtype if tensor.dtype in casts else None)
        return done[id(tensor)][1]

    return model._apply(convert)


def _check(model: nn.Module) -> None:
    """Refuse tensors that an arena or a checkpoint cannot hold."""
    saved = model.state_dict(keep_vars=True)
    for what, name, tensor in _named(model):
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_quantized:
            raise ModelError(f"{what} {name} is quantised ({kind}), which cannot be trained; dequantize() it")
        if tensor.requires_grad and tensor.is_complex():
            raise ModelError(
                f"{what} {name} is {kind}, but the gradient arena holds real numbers; store it as pairs of real "
                "numbers (torch.view_as_real) and use torch.view_as_complex in forward"
            )
        if tensor.requires_grad and tensor.layout is not torch.strided:
            raise ModelError(f"{what} {name} is sparse, but the gradient arena is dense; make it dense")
        if name in saved and tensor.layout is not torch.strided:
            raise ModelError(
                f"{what} {name} is sparse, which model.safetensors cannot hold; make it dense, or keep it out of the "
                "saved model: register_buffer(..., persistent=False)"
            )
        if name in saved and tensor.dtype in (torch.complex128, torch.complex32):
            raise ModelError(
                f"{what} {name} is {kind}, which model.safetensors cannot hold; make it complex64 or pairs of real "
                "numbers, or keep it out of the saved model: register_buffer(..., persistent=False)"
            )


def _named(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield "parameter", name, parameter
    for name, buffer in model.named_buffers():
        yield "buffer", name, buffer


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share a memory location: then the tensor cannot be written to."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return False
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
