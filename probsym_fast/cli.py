"""The command `probsym`: fit, test and profile experiments, show the available backends, get data sets."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from probsym_fast._output import patient_output

PROFILED = ("weights", "samples", "modes", "chunks", "backends", "draws", "device", "seconds", "repeats")
MOLECULES_EXTRA = {"ase", "tblite"}  # whose error says what to install
TRAIN_EXTRA = {
    "filelock",
    "lightning",
    "torch_geometric",
    "torchmetrics",
    "jsonargparse",
    "yaml",
    "matplotlib",
    "rich",
    "tensorboard",
    "timm",
    "transformers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0 on success, 1 after an error message, 128 + signal if one stopped it."""
    try:
        with patient_output():
            return _main(arguments)
    except OSError as error:  # of writing the output, such as a full disk
        if (text := _file_error(error)) is None:
            raise
        return _refuse(text)


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="probsym", description="Probabilistic symmetrization, fast.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="fit | test | sweep | profile | info | data"
    )
    for name, about in (
        ("fit", "train a configuration and test it"),
        ("test", "test a trained configuration"),
    ):
        command = commands.add_parser(
            name,
            help=about,
            description=about.capitalize() + ". Override any key of the configuration with --key value.",
        )
        command.add_argument(
            "-c", "--config", required=True, help="a YAML file, or a packaged name such as nbody/gnn_O3_ps"
        )
        if name == "fit":
            command.add_argument(
                "--resume",
                action="store_true",
                help="continue from the run's last checkpoint (a comparison always does)",
            )
        _add_keys(command)
        _add_import(command)
    _add_sweep(commands)
    _add_profile(commands)
    commands.add_parser(
        "info", help="show which backends are built and which each op uses, and list the configurations"
    )
    data = commands.add_parser("data", help="list the data sets, or generate or download one")
    data.add_argument("action", choices=["list", "get"])
    data.add_argument("name", nargs="?", help="the data set to get")
    data.add_argument(
        "--force", action="store_true", help="generate or read the data set again even if its file exists"
    )
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("fit", "test", "sweep", "profile"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        functions = {"fit": _run, "test": _run, "sweep": _sweep, "profile": _profile, "info": _info, "data": _data}
        run = functions[options.command]
        return run(options, rest)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in MOLECULES_EXTRA:
            return _refuse(str(error))
        if missing not in TRAIN_EXTRA:
            raise
        return _refuse(f'{error.name} is needed for this command: pip install "probsym_fast[train]"')
    except KeyboardInterrupt:
        print("\nprobsym: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError) as error:
        return _refuse(str(error))
    except OSError as error:
        if (text := _file_error(error)) is None:
            raise
        return _refuse(text)


def _file_error(error: OSError) -> str | None:
    """One line for an error of a file, a full disk or our own code; None for other system errors."""
    from probsym_fast._files import FULL

    if error.errno is None:
        return str(error)
    if error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return f"{name}: {error.strerror}"
    return str(error.strerror) if error.errno in FULL else None


def _add_keys(command: argparse.ArgumentParser) -> None:
    command.add_argument("--keys", action="store_true", help="list the configuration's keys and exit")


def _print_keys(command: str, config: Any) -> int:
    from probsym_fast.tasks import configuration

    parser = configuration.parser_of(type(config), f"probsym {command} -c CONFIG")
    parser.set_defaults(configuration.by_key(config))
    parser.print_help()
    return 0


def _add_import(command: argparse.ArgumentParser) -> None:
    text = "a module that registers tasks of your own, imported first; the current folder counts too"
    command.add_argument("--import", dest="modules", action="append", metavar="MODULE", default=[], help=text)


def _import(modules: Sequence[str]) -> None:
    """Imports the modules. Raises ValueError for one that cannot be imported."""
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            text = f"must name a module that can be imported, got {name!r}: {error}"
            raise ValueError(f"--import {text}") from error


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    text = "train a comparison unattended: a process for every run, at low priority"
    about = (
        f"{text.capitalize()}. Runs that are finished are kept, stopped ones continue: give the same command again after "
        "Ctrl-C or a crash. The folder gets table.md after every run. Override any key of the configuration with --key value."
    )
    command = commands.add_parser("sweep", help=text, description=about, allow_abbrev=False)
    add = command.add_argument
    add(
        "-c",
        "--config",
        required=True,
        help="a comparison: a YAML file, or a packaged name such as pattern/small_methods",
    )
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    add("--threads", type=int, metavar="N", help="threads of each run (default: torch's)")
    add("--nice", type=int, default=10, metavar="N", help="lower the priority by N (default: 10)")
    _add_keys(command)
    _add_import(command)


def _add_profile(commands: argparse._SubParsersAction) -> None:
    text = "measure throughput, memory, tax and variance against the number of samples"
    about = text.capitalize() + ". Override any key of the configuration with --key value."
    command = commands.add_parser(
        "profile", help=text, description=about, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    add = command.add_argument
    _add_import(command)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("-c", "--config", help="a YAML file, or a packaged name such as nbody/gnn_O3_ps")
    what.add_argument(
        "--join",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="measure nothing; plot the variances of these profiles together",
    )
    add(
        "--weights",
        type=Path,
        help="checkpoint, such as runs/x/checkpoints/best.ckpt with -c runs/x/config.yaml (default: new weights)",
    )
    add("--samples", type=int, nargs="+", metavar="S", help="numbers of samples (default: 1 2 4 8 16 32 64)")
    add("--modes", nargs="+", help="training, inference, or variance only (default: training inference)")
    add(
        "--chunks", type=_chunk, nargs="+", help="samples per pass: numbers, auto or all (default: the configuration's)"
    )
    add("--backends", nargs="+", help="backends of the ops: auto, reference, or one by name (default: auto)")
    add("--draws", nargs="+", help="kinds of noise: independent, antithetic, stratified (default: the configuration's)")
    add("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    add("--seconds", type=float, help="time for each row, which runs at least three steps (default: 1)")
    add("--repeats", type=int, help="predictions per variance (default: 16)")
    add(
        "--output",
        type=Path,
        help="folder for profile.json (saved after each row), .png and .pdf (default: runs/NAME/profile)",
    )
    add(
        "--trace",
        action="store_true",
        help="also write trace.json for ui.perfetto.dev: one training step, with the first value of each list",
    )


def _chunk(text: str) -> int | str | None:
    if text in ("all", "auto"):
        return None if text == "all" else text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, auto or all, got {text!r}") from None


def _refuse(message: str) -> int:
    """Prints the message as one line."""
    print(f"probsym: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 1


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from probsym_fast import tasks
    from probsym_fast.tasks import configuration

    _import(options.modules)
    task = tasks.load(options.config, rest)
    if options.keys:
        return _print_keys(options.command, task.config)
    from probsym_fast.training import run as training

    if options.command == "fit" and options.resume and isinstance(task, tasks.Computation) and not task.continues:
        wanted = "left out where the experiment trains no single model (run it again without)"
        raise ValueError(f"fit: --resume must be {wanted}, got it for task {task.config.task!r}")
    folder = training.run_folder(task.config)
    if training.is_first_process():
        print(f"{options.command} {options.config}: run folder {folder}", flush=True)
    results: dict[str, Any] | None
    try:
        if not isinstance(task, tasks.Task):  # nothing is trained, or the experiment trains several runs itself
            results = training.compute(cast("tasks.Computation", task))
        else:
            results = training.fit(task, resume=options.resume) if options.command == "fit" else training.test(task)
    except training.Stopped as stop:
        if not training.is_first_process():
            return 0
        print(f"\nprobsym: {stop}", file=sys.stderr)
        return stop.status
    except training.Fault as fault:
        return _refuse(str(fault))
    if results is None:
        return 0
    _table(configuration.full_name(task.config), task.table(results))
    there = (f"   {name}: {folder / name}" for name in ("plots", "logs") if (folder / name).is_dir())
    print(f"figures: {folder / 'results.json'}{''.join(there)}")
    return 0


def _sweep(options: argparse.Namespace, rest: list[str]) -> int:
    from probsym_fast import tasks
    from probsym_fast.tasks.comparison import Comparison
    from probsym_fast.tasks.sweep import Sweep
    from probsym_fast.training import run as training

    _import(options.modules)
    task = tasks.load(options.config, rest)
    if not isinstance(task, Comparison):
        raise ValueError(f"sweep: config must be a comparison (task: comparison), got task {task.config.task!r}")
    if options.keys:
        return _print_keys("sweep", task.config)
    sweep = Sweep(
        task, jobs=options.jobs, niceness=options.nice, threads=options.threads, modules=tuple(options.modules)
    )
    try:
        results = sweep.run()
    except training.Stopped as stop:
        print("\nprobsym: stopped; the same command continues", file=sys.stderr)
        return stop.status
    except (training.Fault, RuntimeError) as error:
        return _refuse(str(error))
    print(sweep.table())
    _table(tasks.configuration.full_name(task.config), task.table(results))
    print(f"figures: {sweep.folder / 'results.json'}   table: {sweep.folder / 'table.md'}")
    return 0


def _profile(options: argparse.Namespace, rest: list[str]) -> int:
    import probsym_fast.profiling.plots  # noqa: F401  reports a missing matplotlib before measuring
    from probsym_fast import tasks
    from probsym_fast.training.ownership import owned

    given = vars(options)
    if "join" in given:
        return _join(options, rest)
    _import(given.get("modules", []))
    task = tasks.load(options.config, rest)
    folder = given.get("output") or Path("runs") / tasks.configuration.full_name(task.config) / "profile"
    with owned(folder):  # reports an unwritable folder before measuring
        return _profile_in(folder, task, given)


def _profile_in(folder: Path, task: Any, given: dict[str, Any]) -> int:
    from probsym_fast.profiling.measure import profile
    from probsym_fast.profiling.tracing import trace

    settings = {name: given[name] for name in PROFILED if name in given}
    found = profile(task, path=folder / "profile.json", **settings)
    print("  ".join(f"{key} {value}" for key, value in found.machine.items()))
    print(f"{found.name}, batch {found.batch}, weights: {found.weights}\n{found.table()}")
    for ending in ("png", "pdf"):
        found.plot(folder / f"profile.{ending}")
    if "trace" in given:
        first = found.rows[0]  # the first value of each list
        case = {name: getattr(first, name) for name in ("samples", "chunk", "backend", "draws")}
        case |= {name: given.get(name) for name in ("weights", "device")}
        trace(task, path=folder / "trace.json", **case)
    print(f"figures: {folder / 'profile.json'}   plot: {folder / 'profile.png'}, .pdf")
    if "trace" in given:
        step = f"S = {first.samples}, chunk {first.chunk or 'all'}, backend {first.backend}, {first.draws} draws"
        print(f"trace: {folder / 'trace.json'} (training step, {step}; open it in ui.perfetto.dev)")
    return 0


def _join(options: argparse.Namespace, rest: list[str]) -> int:
    from probsym_fast.profiling.plots import plot_variances
    from probsym_fast.profiling.results import gains_table, joined, read_profiles, save_profiles
    from probsym_fast.training.ownership import owned

    if rest:
        raise ValueError(f"profile: --join must be used without configuration keys, got {' '.join(rest)}")
    if others := [f"--{name}" for name in (*PROFILED, "trace") if name in vars(options)]:
        raise ValueError(f"profile: --join must be used without measurement options, got {' '.join(others)}")
    profiles = joined([one for path in options.join for one in read_profiles(path)])
    folder = getattr(options, "output", None) or Path("runs") / "averages"
    with owned(folder):
        print(gains_table(profiles))
        save_profiles(folder / "averages.json", profiles)
        for ending in ("png", "pdf"):
            parts = [(one.name, one.state(), [vars(row) for row in one.rows]) for one in profiles]
            plot_variances(folder / f"averages.{ending}", parts)
    print(f"figures: {folder / 'averages.json'}   plot: {folder / 'averages.png'}, .pdf")
    return 0


def _info(options: argparse.Namespace, rest: list[str]) -> int:
    from probsym_fast import info

    facts = info()
    _table("versions", list(facts["versions"].items()))
    extension = facts["extension"]
    built = f"built with torch {extension['built_for_torch']}, {extension['instruction_set']}"
    built += f", gradients in {extension['gradients']}"
    _table(
        "devices",
        [("compiled kernels", built if extension["built"] else "not in use"), *facts["devices"].items()],
    )
    if extension["problem"]:
        print(f"note: {extension['problem']}")
    _table(
        "ops: backends by device, auto's choice first",
        [(op, "; ".join(f"{d}: {', '.join(b)}" for d, b in devices.items())) for op, devices in facts["ops"].items()],
    )
    try:
        from probsym_fast.training.configuration import available
    except ModuleNotFoundError as error:
        print(f'configurations: need {error.name}: pip install "probsym_fast[train]"')
    else:
        _table("configurations (probsym fit -c NAME)", [(name, "") for name in available()])
    return 0


def _data(options: argparse.Namespace, rest: list[str]) -> int:
    from probsym_fast.data import NBody, cache_dir, dynamics, exp, g2, graph8c, lrgb, pattern, published_pattern
    from probsym_fast.data.exp import URL as EXP_URL

    benchmark = {
        "peptides-func": "15,535 peptides, ten functions to predict (Long Range Graph Benchmark)",
        "peptides-struct": "the same peptides, eleven properties of shape to predict",
        "pcqm-contact": "529,434 molecules, contacts between atoms to predict",
    }
    simulated = {  # made with the extra `molecules`
        "md_ethanol": "1,700 frames of ethanol (9 atoms) at 500 K with energies and forces, GFN2-xTB (1 MB, 2 minutes)",
        "md_aspirin": "the same of aspirin (21 atoms; 2 MB, 8 minutes)",
        "md_alanine_dipeptide": "the same of a small peptide (22 atoms; 2 MB, 6 minutes)",
        "g2": "the 162 molecules of G2 (1 to 14 atoms), each displaced 11 times, GFN2-xTB (1.3 MB, seconds)",
    }
    splits = ("train", "valid", "test")

    if options.action == "list":
        if options.name or options.force:
            raise ValueError(f"data: list must come without other arguments, got {options.name or '--force'!r}")
        file = next((cache_dir() / "nbody").glob("*.npz"), None)
        where = _state(file) if file else "generated on first use (under a minute)"
        file_exp = cache_dir() / "exp" / "GRAPHSAT.pkl"
        where_exp = (
            f"in {file_exp}" if file_exp.is_file() else "`probsym data get exp` downloads it from the authors' page"
        )
        rows = [
            ("nbody", f"14,000 trajectories of five charged particles; {where}"),
            ("graph8c", "11,117 connected graphs of 8 nodes; enumerated on first use (seconds)"),
            ("exp", f"600 pairs of graphs that the 1-WL test cannot distinguish; {where_exp}"),
            ("wl_pairs", "600 similar pairs of our own; generated each time (under a second)"),
            (
                "pattern",
                "14,000 community graphs with a planted pattern, our own draw; generated on first use (seconds)",
            ),
        ]
        for name, about in simulated.items():
            folder = cache_dir() / ("g2" if name == "g2" else "dynamics")
            found = {path.name.split("-")[1] for path in folder.glob(f"{name.removeprefix('md_')}-*-seed0.npz")}
            rows.append((name, f"{about}; " + (f"in {folder}" if set(splits) <= found else "made on first use")))
        published = {"published_pattern": "the 14,000 graphs of PATTERN as published", **benchmark}
        for name, about in published.items():
            folder = cache_dir() / ("lrgb" if name in benchmark else "gnn_benchmark")
            folder = folder / (name if name in benchmark else "PATTERN") / "compact"
            there = all((folder / f"{split}.npz").is_file() for split in splits)
            rows.append((name, f"{about}; " + (f"in {folder}" if there else f"`probsym data get {name}` downloads it")))
        _table("data sets", rows)
        return 0
    if (dashed := (options.name or "").replace("_", "-")) in benchmark:  # spelled as in the configurations
        options.name = dashed
    if options.name == "nbody":
        sets = [NBody(split, force=options.force and split == "train") for split in splits]
        print(f"nbody: {' + '.join(str(len(s)) for s in sets)} trajectories in {sets[0].path}")
    elif options.name == "graph8c":
        print(f"graph8c: {len(graph8c(force=options.force))} graphs in {cache_dir() / 'graph8c'}")
    elif options.name == "exp":
        print(f"exp: {len(exp(url=EXP_URL))} graphs in {cache_dir() / 'exp'}")
    elif options.name == "pattern":
        counts = [len(pattern(split, force=options.force)) for split in splits]
        print(f"pattern: {' + '.join(map(str, counts))} graphs in {cache_dir() / 'pattern'}")
    elif options.name == "published_pattern":
        first = [options.force, False, False]  # the first call reads all splits
        counts = [len(published_pattern(s, download=True, force=f)) for s, f in zip(splits, first, strict=True)]
        print(f"published_pattern: {' + '.join(map(str, counts))} graphs in {cache_dir() / 'gnn_benchmark'}")
    elif options.name in benchmark:
        counts = [len(lrgb(options.name, s, download=True, force=options.force and s == "train")) for s in splits]
        print(f"{options.name}: {' + '.join(map(str, counts))} graphs in {cache_dir() / 'lrgb'}")
    elif options.name in simulated:
        load = g2 if options.name == "g2" else partial(dynamics, options.name.removeprefix("md_"))
        counts = [len(load(split, force=options.force)) for split in splits]
        folder = cache_dir() / ("g2" if options.name == "g2" else "dynamics")
        print(f"{options.name}: {' + '.join(map(str, counts))} conformations in {folder}")
    else:
        names = ", ".join(["nbody", "graph8c", "exp", "pattern", *simulated, "published_pattern", *benchmark])
        raise ValueError(f"data: name must be one of {names}, got {options.name!r}")
    return 0


def _state(file: Path) -> str:
    from probsym_fast.data._store import load_arrays

    try:
        load_arrays(file, {}, mend="run `probsym data get nbody --force`")
    except ValueError as error:
        return f"damaged: {error}"
    return f"cached in {file}"


def _table(title: str, rows: Sequence[tuple[str, object]]) -> None:
    """Two columns, plain text."""
    width = max((len(name) for name, _ in rows), default=0)
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}".rstrip())
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
