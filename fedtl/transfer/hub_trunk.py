"""Trunks that are somebody's own torch code: a local clone for ``torch.hub``, or a dotted path.

Opening one RUNS that code, with all rights of this process. A scenario's own author may ask for it;
what a server announces never does (``deployment.backbone_transfer``).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtl.errors import FedtlError, InputError, nearest
from fedtl.scenario import schema
from fedtl.transfer import weights
from fedtl.transfer.backbones import Backbone
from fedtl.transfer.drawing import seeded
from fedtl.transfer.preprocessing import Preprocessing, plain

if TYPE_CHECKING:
    from torch import nn

OWN = "own"
"""The source of weights that the code itself makes or loads."""


def open_hub(section: schema.Backbone, key: int) -> Backbone:
    """An entry point of a local clone with a ``hubconf.py``, called without arguments.

    Raises:
        InputError: no such clone or entry point, code that fails, or no [n, D] features.
        SecurityRefusal: the weights file has not the stated hash, or is unsafe.
    """
    folder = Path(section.path or "").expanduser().resolve()
    return _open(section, key, folder, sorted(folder.glob("**/*.py")))


def open_module(section: schema.Backbone, key: int) -> Backbone:
    """A user's own module, ``package.module:Class``, made without arguments.

    It is looked for in the current folder (or in ``backbone.path``) and among what is installed.

    Raises:
        InputError: what cannot be imported, code that fails, or no [n, D] features.
        SecurityRefusal: the weights file has not the stated hash, or is unsafe.
    """
    folder = Path(section.path or "").expanduser().resolve()
    maker = find_class(folder, section.model or "")
    file = inspect.getsourcefile(inspect.unwrap(maker))
    return _open(section, key, folder, _with_helpers(Path(file)) if file else [])


def _with_helpers(file: Path) -> list[Path]:
    """A module's file and all that it may import from around it: its package, or its folder."""
    if not (file.parent / "__init__.py").is_file():
        return sorted(file.parent.glob("*.py"))
    top = file.parent
    while (top.parent / "__init__.py").is_file():
        top = top.parent
    return sorted(top.glob("**/*.py"))


def _open(section: schema.Backbone, key: int, folder: Path, files: list[Path]) -> Backbone:
    path = None if section.weights in ("default", "none") else Path(section.weights).expanduser()
    preprocessing = plain(section.image_size or 224, section.mean, section.std)
    skeleton = {
        "kind": section.name,
        "folder": str(folder),
        "model": section.model,
        "key": key,
        **preprocessing.identity(),
    }
    digest = weights.identify(section, path, key)
    build = functools.cache(functools.partial(_build, skeleton, preprocessing, path, digest))
    dim = _try_out(build(), skeleton, preprocessing.crop)
    if path is None:  # its own code decides what they are
        from fedtl.transfer.trunks import hash_state

        digest = hash_state(build())
    code = hashlib.sha256()
    for file in files:
        code.update(hashlib.sha256(file.read_bytes()).digest())
    return Backbone(
        section.name,
        "output",
        preprocessing,
        digest,
        path.name if path else OWN,
        build,
        dim,
        path,
        skeleton=skeleton,
        settings={"model": section.model, "code": code.hexdigest()},
    )


def build_bare(facts: Mapping[str, Any], preprocessing: Preprocessing) -> nn.Module:
    """The trunk that a skeleton describes, with the weights its own code gives it.

    Raises:
        InputError: code that is not there, that fails, or that makes no module.
    """
    from torch import nn

    from fedtl.transfer.trunks import Trunk

    kind, model = facts["kind"], facts["model"]
    with seeded(facts["key"]):
        body = _made(kind, Path(facts["folder"]), model)
    if not isinstance(body, nn.Module):
        raise InputError(
            f"{model} makes no torch module",
            where="backbone.model",
            got=type(body).__name__,
            allowed="torch.nn.Module",
        )
    return Trunk(body, preprocessing)


def _made(kind: str, folder: Path, model: str) -> Any:
    """What somebody's code makes, called without arguments."""
    if kind == "hub":
        from torch import hub

        conf = folder / "hubconf.py"
        if not conf.is_file():
            raise InputError(
                "this is no local clone for torch.hub: it has no hubconf.py",
                where="backbone.path",
                got=folder,
                do="Clone the repository yourself, read it, and give its folder",
            )
        known = _defined(conf)
        if model not in known:
            raise _unknown("this clone has no such entry point", model, known)
        return _run(
            lambda: hub.load(str(folder), model, source="local"),  # type: ignore[no-untyped-call]
            f"{model} cannot be made",
        )
    maker = find_class(folder, model)
    return _run(maker, f"{model} cannot be made")


def find_class(folder: Path, model: str) -> Callable[..., Any]:
    """What ``package.module:Class`` stands for; the module runs as it is imported."""
    file, _, name = model.partition(":")
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        module = _run(lambda: importlib.import_module(file), f"{file} cannot be imported")
    finally:
        sys.path[:] = before
    _refuse_other_file(module, folder, file)
    maker: Any = getattr(module, name, None)
    if not callable(maker):
        known = [other for other, value in vars(module).items() if callable(value)]
        raise _unknown(f"there is no such class in {file}", name, known)
    return maker  # type: ignore[no-any-return]


def _refuse_other_file(module: Any, folder: Path, name: str) -> None:
    """Python knows one module of a name: raise InputError where the folder has another."""
    place = folder.joinpath(*name.split("."))
    mine = [path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()]
    found = getattr(module, "__file__", None)
    if mine and (found is None or Path(found).resolve() != mine[0].resolve()):
        raise InputError(
            f"{name} is another module here, which was imported before",
            where="backbone.model",
            got=found or "a module of Python's own",
            allowed=str(mine[0]),
            do="Give your file another name, or do this in a process of its own",
        )


def _defined(file: Path) -> list[str]:
    """The public names that a file defines or imports, without running it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise InputError("this is no Python file", where=file, got=type(error).__name__) from error
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def _unknown(what: str, name: str, known: list[str]) -> InputError:
    guess = nearest(name, known)
    return InputError(
        what,
        where="backbone.model",
        got=repr(name),
        allowed=", ".join(sorted(known)[:12]),
        do=f"Did you mean {guess!r}?" if guess else None,
    )


def _run(call: Callable[[], Any], what: str) -> Any:
    """Somebody's code; what it raises becomes an InputError of one line."""
    try:
        return call()
    except FedtlError:
        raise
    except Exception as error:  # anything at all may come from there
        lines = str(error).strip().splitlines()
        raise InputError(
            what,
            where="backbone.model",
            got=f"{type(error).__name__}: {lines[0][:200] if lines else ''}",
            do="Mend that code, or backbone.model and backbone.path",
        ) from error


def _build(
    skeleton: Mapping[str, Any], preprocessing: Preprocessing, path: Path | None, digest: str
) -> nn.Module:
    from fedtl.transfer import trunks

    trunk = build_bare(skeleton, preprocessing)
    if path is not None:
        # The file must still be the one that was hashed when the backbone was opened.
        state = weights.load_weights(path, digest)
        body: Any = trunk.body
        trunks.load_strictly(body, state, "\0", str(skeleton["model"]), (), path)
    return trunk


def _try_out(trunk: nn.Module, skeleton: Mapping[str, Any], size: int) -> int:
    """D, by one black image."""
    import torch

    black = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    with torch.inference_mode():
        found = _run(lambda: trunk(black), f"{skeleton['model']} fails on an image")
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != 1:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise InputError(
            f"{skeleton['model']} gives no feature vectors",
            where="backbone.model",
            got=f"shape {shape}" if isinstance(found, torch.Tensor) else shape,
            allowed="a tensor [n, D]",
            do="Let it end with a global pooling and flatten(1), without a classifier",
        )
    return int(found.shape[1])
