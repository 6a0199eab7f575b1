"""Modules that wrap a model or part of it: tensor names without the wrapper, and models that are rejected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from hpctrain.errors import ModelError

_COMPILED = re.compile(r"(?<![^./])_orig_mod\.")  # the prefix that torch.compile adds to names in its module
_PARALLEL = ("torch.nn.parallel.", "torch.distributed.fsdp.", "torch.distributed._composable.")


def plain_name(name: str) -> str:
    """The name of a parameter or buffer, or a path that ends with one, as in the model before torch.compile."""
    return _COMPILED.sub("", name)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state_dict by plain names (without modules' extra state); not copied."""
    return {plain_name(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def load_plain_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors by plain names into the model. Raises RuntimeError, as torch does, if they do not match it."""
    own = model.state_dict()
    given = {plain_name(name): value for name, value in tensors.items()}
    renamed = {name: given.pop(plain_name(name)) for name in own if plain_name(name) in given}
    extra = {name: value for name, value in own.items() if name not in renamed and not isinstance(value, Tensor)}
    model.load_state_dict({**renamed, **extra, **given})


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Like `nn.Module.named_parameters`, with plain names."""
    return ((plain_name(name), parameter) for name, parameter in model.named_parameters())


def check_model(what: str, model: nn.Module) -> None:
    """Reject a model that other software distributes over processes or devices, or that has no values yet.

    `what`: the key and its value, for messages. Raises ModelError.
    """
    for name, module in model.named_modules():
        if any(cls.__module__.startswith(_PARALLEL) for cls in type(module).__mro__):
            where = f"layer {name} of it" if name else "it"
            raise ModelError(
                f"{what}: {where} is a {type(module).__name__}, which distributes the model itself; pass the module "
                "inside it (.module), since hpctrain averages gradients itself"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(
                f"{what}: {plain_name(name)} is on the meta device, so it has no values; build the model on the CPU, "
                "or give it memory (to_empty) and initialise it before it is returned"
            )
