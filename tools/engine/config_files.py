"""Find, read and change configs: paths, names of the shipped ones, ``--cfg-options``."""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmengine.config import Config, DictAction

from ... import configs

CONFIG_ROOT = Path(configs.__file__).parent
CONFIG_SUFFIXES = (".py", ".json", ".yaml", ".yml")
# Keys that mmengine's Runner and the launchers read beside the Runner's own arguments.
RUNNER_KEYS = (
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "runner_type",
    "sync_bn",
)


def shipped_configs() -> dict[str, Path]:
    """List the configs that come with densezoo: name without ``.py`` -> path."""
    paths = sorted(CONFIG_ROOT.glob("*/*.py"))
    return {path.stem: path for path in paths if path.parent.name != "_base_"}


def find_config(config: str) -> Path:
    """Find a config by its path, or by the name of a shipped one with or without ``.py``.

    Raises:
        FileNotFoundError: if it is neither; names the nearest shipped ones.
        IsADirectoryError, ValueError: if it is a folder, or a file of another kind.
    """
    path = Path(config)
    if path.is_file():
        if path.suffix not in CONFIG_SUFFIXES:
            raise ValueError(
                f"config {config!r} is a file of another kind; give one of {CONFIG_SUFFIXES}"
            )
        return path
    if path.is_dir() and config:
        raise IsADirectoryError(f"config {config!r} is a folder; name a config file in it")
    shipped = shipped_configs()
    name = path.name.removesuffix(".py")
    if name in shipped and len(path.parts) == 1:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, n=4, cutoff=0.5) or list(shipped)[:4]
    raise FileNotFoundError(
        f"config {config!r} is neither a file nor a config of densezoo; nearest: {', '.join(near)}"
    )


def load_config(config: str, cfg_options: Sequence[str] = ()) -> Config:
    """Read a config and apply ``KEY=VALUE`` options.

    Args:
        config: a path, or the name of a shipped config.
        cfg_options: options as mmengine's ``DictAction`` reads them, for example
            ``train_dataloader.batch_size=8``, ``param_scheduler.1.end=6``, ``model.neck=None``.

    Raises:
        FileNotFoundError: if the config, or one that it inherits, is not there.
        ImportError: if it needs a package that is not installed.
        ValueError: if it does not parse, or an option is malformed or changes a key that no
            config has.
    """
    path = find_config(config)
    _check_bases(path, ())
    try:
        cfg = Config.fromfile(path)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"config {path} needs a package that is missing ({error}); "
            "pip install 'densezoo[openmmlab]' installs all of them"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"config {path}: {str(error).partition(', the current')[0]}; check its custom_imports, "
            "or add the folder of the module to PYTHONPATH"
        ) from error
    except OSError:
        raise
    except (Exception, SystemExit) as error:
        # The config is a program of the user's: whatever it raises is a mistake in it.
        raise ValueError(f"config {path} can't be read: {type(error).__name__}: {error}") from error
    apply_options(cfg, cfg_options)
    return cfg


def _check_bases(path: Path, heirs: tuple[Path, ...]) -> None:
    """Check that what a Python config inherits is there, and does not inherit the config.

    mmengine goes round in a circle until the stack is full, which takes long.
    """
    try:
        statements = ast.parse(path.read_bytes()).body if path.suffix == ".py" else ()
        inherited = [
            ast.literal_eval(statement.value)
            for statement in statements
            if isinstance(statement, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == "_base_" for t in statement.targets)
        ]
    except (SyntaxError, ValueError):
        return  # reading it says what is wrong, or how its _base_ is computed
    for bases in inherited:
        for base in [bases] if isinstance(bases, str) else bases:
            if "::" in base or ":/" in base:
                continue  # of another package, or on a remote store
            base_path = (path.parent / base).resolve()
            if base_path in (*heirs, path.resolve()):
                raise ValueError(
                    f"config {path} inherits {base}, which inherits it in turn: check their _base_"
                )
            if not base_path.is_file():
                raise FileNotFoundError(
                    f"config {path} inherits {base}, which does not exist: check its _base_"
                )
            _check_bases(base_path, (*heirs, path.resolve()))


def apply_options(cfg: Config, cfg_options: Sequence[str]) -> None:
    """Apply ``KEY=VALUE`` options to a config, in place.

    Raises:
        ValueError: if an option has no ``=``, or its first key is none of a config's, or an index
            is out of range.
    """
    from mmengine.runner import Runner

    known = [*cfg.keys(), *inspect.signature(Runner.__init__).parameters, *RUNNER_KEYS]
    for option in cfg_options:
        key, equals, _ = option.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"--cfg-options takes KEY=VALUE, as in a.b=1, got {option!r}")
        first = key.split(".")[0]
        if first not in known:
            near = difflib.get_close_matches(first, set(known), n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(cfg.keys())}"
            raise ValueError(f"--cfg-options {option}: the config has no {first!r}; {hint}")
    if not cfg_options:
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    try:
        cfg.merge_from_dict(parser.parse_args(["--cfg-options", *cfg_options]).cfg_options)
    except (
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        ValueError,
        RecursionError,
    ) as error:
        reason = str(error.args[0] if error.args else error).partition(" [{")[0]
        if isinstance(error, RecursionError):  # what DictAction makes of a call with a comma
            reason = (
                "a value is a word, a number, or a list in brackets; name a dict's keys as a.b=1"
            )
        raise ValueError(
            f"--cfg-options {' '.join(cfg_options)} does not fit the config: {reason}"
        ) from error


def walk_dicts(value: object, prefix: str = "") -> Iterator[tuple[str, dict]]:
    """Yield (dotted key, dict) of every dict in a config's value, outermost first."""
    if isinstance(value, dict):
        yield prefix, value
        for key, child in value.items():
            yield from walk_dicts(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from walk_dicts(child, f"{prefix}.{index}")


def require_keys(cfg: Config, keys: Sequence[str], task: str) -> None:
    """Raise a ValueError that names what a config lacks for a task, such as "train"."""
    missing = [key for key in keys if not cfg.get(key)]
    if missing:
        raise ValueError(f"config {cfg.filename} can't {task}: it lacks {', '.join(missing)}")
