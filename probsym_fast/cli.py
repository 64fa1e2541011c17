"""The command `probsym`: fit and test experiments, tell what is built, fetch data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError)
TRAIN_EXTRA = {"lightning", "jsonargparse", "yaml", "matplotlib", "rich", "tensorboard"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 1 refused with a message, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="probsym", description="Probabilistic symmetrization, fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="fit | test | info | data")
    for name, text in (
        ("fit", "train a configuration, then test it"),
        ("test", "test a trained configuration"),
    ):
        command = commands.add_parser(
            name, help=text, description=text.capitalize() + ". Any key of the configuration: --key value."
        )
        command.add_argument(
            "-c", "--config", required=True, help="a YAML file, or a packaged name such as nbody/gnn_O3_ps"
        )
        if name == "fit":
            command.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
        command.add_argument("--keys", action="store_true", help="list the keys of the configuration, and stop")
    commands.add_parser("info", help="what is built and chosen, and which configurations there are")
    data = commands.add_parser("data", help="list the data sets, or generate one")
    data.add_argument("action", choices=["list", "get"])
    data.add_argument("name", nargs="?", help="a data set, for get")
    data.add_argument("--force", action="store_true", help="generate anew even if the file is there")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("fit", "test"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return {"fit": _run, "test": _run, "info": _info, "data": _data}[options.command](options, rest)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in TRAIN_EXTRA:
            raise
        return _refuse(f'{error.name} is needed here: pip install "probsym_fast[train]"')
    except KeyboardInterrupt as stop:
        print(f"\nprobsym: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    except ERRORS as error:
        return _refuse(str(error))


def _refuse(message: str) -> int:
    print(f"probsym: error: {message}", file=sys.stderr)
    return 1


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from probsym_fast import tasks
    from probsym_fast.tasks import configuration

    if options.keys:
        values = configuration.read(configuration.find(options.config))
        configuration.parser_of(tasks.TASKS[values["task"]][0]).print_help()
        return 0
    task = tasks.load(options.config, rest)
    from probsym_fast.tasks import training

    folder = training.run_folder(task.config)
    print(f"{options.command} {options.config}: run folder {folder}", flush=True)
    results = training.fit(task, resume=options.resume) if options.command == "fit" else training.test(task)
    _table(f"{task.config.task}: {task.config.name}", task.describe(results))
    print(f"figures: {folder / 'results.json'}   plots: {folder / 'plots'}   logs: {folder / 'logs'}")
    return 0


def _info(options: argparse.Namespace, rest: list[str]) -> int:
    from probsym_fast import info

    facts = info()
    _table("versions", list(facts["versions"].items()))
    extension = facts["extension"]
    built = f"built for torch {extension['built_for_torch']}, {extension['instruction_set']}"
    _table(
        "devices",
        [("compiled kernels", built if extension["built"] else "not built"), *facts["devices"].items()],
    )
    if extension["problem"]:
        print(f"note: {extension['problem']}")
    _table(
        "ops: backends, the one that auto chooses first",
        [(op, "; ".join(f"{d}: {', '.join(b)}" for d, b in devices.items())) for op, devices in facts["ops"].items()],
    )
    try:
        from probsym_fast.tasks.config import available
    except ModuleNotFoundError as error:
        print(f'configurations: need {error.name}: pip install "probsym_fast[train]"')
    else:
        _table("configurations (probsym fit -c NAME)", [(name, "") for name in available()])
    return 0


def _data(options: argparse.Namespace, rest: list[str]) -> int:
    from probsym_fast.data import NBody, cache_dir

    if options.action == "list":
        file = next((cache_dir() / "nbody").glob("*.npz"), None)
        where = f"cached in {file}" if file else "generated on first use, under a minute"
        _table("data sets", [("nbody", f"14,000 trajectories of five charged particles; {where}")])
        return 0
    if options.name != "nbody":
        raise ValueError(f"data: name must be one of nbody, got {options.name!r}")
    sets = [NBody(split, force=options.force and split == "train") for split in ("train", "valid", "test")]
    print(f"nbody: {' + '.join(str(len(s)) for s in sets)} trajectories in {sets[0].path}")
    return 0


def _table(title: str, rows: list[tuple[str, object]]) -> None:
    """Two columns, plain text."""
    width = max((len(name) for name, _ in rows), default=0)
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}".rstrip())
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
