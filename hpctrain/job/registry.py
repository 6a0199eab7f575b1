"""What a job can name: short names, "package.module:attribute", and records of a program's own objects.

Imports happen on request only, so a job can be read and checked without torch.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from types import FunctionType, ModuleType
from typing import Any

from hpctrain.errors import JobError
from hpctrain.text import did_you_mean, shown

STRATEGIES = {
    "all_reduce": "hpctrain.strategies.all_reduce:AllReduce",
    "diloco": "hpctrain.strategies.diloco:DiLoCo",
    "local_sgd": "hpctrain.strategies.local_sgd:LocalSGD",
    "parameter_server": "hpctrain.strategies.parameter_server:ParameterServer",
    "streaming_diloco": "hpctrain.strategies.streaming_diloco:StreamingDiLoCo",
    "switch": "hpctrain.job.phases:Switch",
}
MODELS = {
    "mlp": "hpctrain.models.mlp:mlp",
    "lenet5": "hpctrain.models.lenet5:lenet5",
    "resnet18": "hpctrain.models.resnet18:resnet18",
    "convnet": "hpctrain.models.convnet:convnet",
    "transformer": "hpctrain.models.transformer:transformer",
    "detector": "hpctrain.models.detector:detector",
}
DATASETS = {
    "bccd_crops": "hpctrain.data.bccd:bccd_crops",
    "digits": "hpctrain.data.digits:digits",
    "ingested": "hpctrain.ingest.dataset:ingested",
    "mnist": "hpctrain.data.mnist:mnist",
    "tinyshakespeare": "hpctrain.data.text:tinyshakespeare",
}
LOSSES = {
    "cross_entropy": "torch.nn.functional:cross_entropy",
    "mse": "torch.nn.functional:mse_loss",
    "model": "hpctrain.models.losses:ModelLoss",
}
METRICS = {
    "accuracy": "hpctrain.models.metrics:accuracy",
    "average_precision": "hpctrain.models.average_precision:AveragePrecision",
    "balanced_accuracy": "hpctrain.models.metrics:BalancedAccuracy",
    "bits": "hpctrain.models.metrics:bits",
}
EVALUATIONS: dict[str, str] = {}
COLLATES: dict[str, str] = {}
AUGMENTATIONS = {
    "shift": "hpctrain.data.augment:shift",
    "flip": "hpctrain.data.augment:flip",
    "light": "hpctrain.data.augment:light",
    "flip_boxes": "hpctrain.data.boxes:flip_boxes",
    "turn_boxes": "hpctrain.data.boxes:turn_boxes",
    "crop_boxes": "hpctrain.data.boxes:crop_boxes",
}
SCHEDULES = {name: f"hpctrain.clock.rates:{name}" for name in ("constant", "linear", "cosine", "step")}
GROUPS = {"decay": "hpctrain.replica.optimizer:decay"}
RULES = {
    "after": "hpctrain.clock.rules:After",
    "loss_stable": "hpctrain.clock.rules:LossStable",
    "loss_stable_published": "hpctrain.clock.rules:LossStablePublished",
    "target": "hpctrain.clock.rules:Target",
}
FUNCTION_AS_RULE = "hpctrain.clock.rules:FunctionAsRule"
# The optimizers with the learning rate of a job that sets none: torch's default, except 0.1 for SGD.
LEARNING_RATES = {
    "SGD": 0.1,
    "Adadelta": 1.0,
    "Adafactor": 0.01,
    "Adagrad": 0.01,
    "Adam": 0.001,
    "AdamW": 0.001,
    "Adamax": 0.002,
    "ASGD": 0.01,
    "Muon": 0.001,
    "MuonAdamW": 0.001,
    "NAdam": 0.002,
    "RAdam": 0.001,
    "RMSprop": 0.01,
    "Rprop": 0.01,
    "SignSGD": 0.001,
}
OPTIMIZERS = {name: f"torch.optim:{name}" for name in LEARNING_RATES}
OPTIMIZERS |= {"MuonAdamW": "hpctrain.replica.muon:MuonAdamW", "SignSGD": "hpctrain.replica.signsgd:SignSGD"}
REFUSED_OPTIMIZERS = {
    "LBFGS": "it evaluates the loss several times within one step, which no strategy can synchronise",
    "SparseAdam": "it takes sparse gradients, and gradients here lie in one dense arena",
}
TABLES: dict[str, dict[str, str]] = {
    "strategy": STRATEGIES,
    "model": MODELS,
    "dataset": DATASETS,
    "loss": LOSSES,
    "metric": METRICS,
    "augmentation": AUGMENTATIONS,
    "evaluation": EVALUATIONS,
    "collate": COLLATES,
    "schedule": SCHEDULES,
    "rule": RULES,
    "groups": GROUPS,
    "optimizer": OPTIMIZERS,
}
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def check(kind: str, name: str) -> None:
    """Refuse a name that cannot be valid, without importing anything.

    Raises JobError if the name is empty, the record of an object ("<...>"), or neither in the table of `kind` nor of
    the form "package.module:attribute".
    """
    table = TABLES[kind]
    module, _, attribute = name.rpartition(":")
    if kind == "optimizer" and attribute in REFUSED_OPTIMIZERS and (not module or module.startswith("torch.optim")):
        raise JobError(f"cannot be used: {REFUSED_OPTIMIZERS[attribute]}")
    if name in table or _PATH.fullmatch(name):
        return
    if name.startswith("<"):
        raise JobError("was an object of the program that made this run; start that program again")
    known = ", ".join(table)
    if ":" in name:
        raise JobError(f'is not of the form "package.module:attribute"{f"; or use one of {known}" if known else ""}')
    use = f'one of {known}, or "package.module:attribute"' if known else '"package.module:attribute"'
    raise JobError(f"unknown {kind}{did_you_mean(name, table)}; use {use}")


def resolve(kind: str, name: str) -> Any:
    """The object that `name` stands for: an entry of the table of `kind`, or "package.module:attribute".

    Imports its module; a user's module may also be in the current directory. Raises JobError if the name is unknown,
    the module or the attribute does not exist, or the import raised. The message is one sentence, without the key that
    held the name, which the caller knows.
    """
    try:
        check(kind, name)
    except JobError as error:
        raise JobError(f'{kind} "{shown(name)}": {error}') from None
    target = TABLES[kind].get(name, name)
    module_name, attributes = target.split(":")
    # Built-in names are looked up in installed packages only, never in the current directory.
    folder = "" if name in TABLES[kind] else _current_directory()
    found: Any = _import(module_name, f'{kind} "{shown(name)}"', folder)
    for part in attributes.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            public = [word for word in dir(found) if not word.startswith("_")]
            text = f"{module_name} has no {shown(attributes)}{did_you_mean(part, public)}"
            raise JobError(f'{kind} "{shown(name)}": {text}') from None
    return found


def _import(name: str, what: str, folder: str) -> ModuleType:
    """Import a module. Modules in `folder` come first, as with `python script.py`, but only during this import.

    A module found there may import neighbours later, in its functions, so the folder then stays last on the path.
    """
    missing = bool(folder) and folder not in sys.path and "" not in sys.path
    if missing:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
        if missing and os.path.abspath(getattr(module, "__file__", None) or "").startswith(folder + os.sep):
            sys.path.append(folder)
        return module
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            places = f"neither in {folder} nor among the installed packages" if folder else "it is not installed"
            raise JobError(f"{what}: there is no module {shown(error.name)}, {places}") from None
        raise JobError(_failure(what, name, error)) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything, including by sys.exit()
        raise JobError(_failure(what, name, error)) from error
    finally:
        if missing and folder in sys.path:
            sys.path.remove(folder)


def _current_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # the current directory was removed
        return ""


def _failure(what: str, module: str, error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    frames = [f for f in _frames(error) if "importlib" not in f[0]]
    place = f" at {os.path.basename(frames[-1][0])}:{frames[-1][1]}" if len(frames) > 1 else ""
    return f"{what}: importing {module} failed{place}: {type(error).__name__}: {shown(text)}"


def _frames(error: BaseException) -> list[tuple[str, int]]:
    found, trace = [], error.__traceback__
    while trace is not None:
        found.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return found


def describe(kind: str, thing: object) -> str:
    """How a Python object is recorded in a job.

    Its short name, or "package.module:name" if importing that gives the same object; else "<name in FILE:LINE>", which
    identifies the object for readers but is refused when loaded.
    """
    for name, target in TABLES[kind].items():
        module, attribute = target.split(":")
        if module in sys.modules and getattr(sys.modules[module], attribute, None) is thing:
            return name
    if isinstance(thing, tuple):
        return f"<tuple of {', '.join(type(item).__name__ for item in thing)}>"
    module_name, qualname = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if isinstance(module_name, str) and isinstance(qualname, str):
        path = f"{module_name}:{qualname}"
        return path if _PATH.fullmatch(path) and _reimports(module_name, qualname, thing) else _place(thing)
    return _place(type(thing), " object")


def _reimports(module_name: str, qualname: str, thing: object) -> bool:
    module = sys.modules.get(module_name)
    if module_name == "__main__" or module is None or getattr(module, "__spec__", None) is None:
        return False
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found is thing


def _place(thing: Any, suffix: str = "") -> str:
    name = str(getattr(thing, "__name__", type(thing).__name__)).strip("<>") + suffix
    try:
        if isinstance(thing, FunctionType):
            file, line = thing.__code__.co_filename, thing.__code__.co_firstlineno
        else:
            file, line = inspect.getsourcefile(thing) or "", inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):
        return f"<{name}>"
    return f"<{name} in {os.path.basename(file)}:{line}>"
