"""``vbon bench``: one table of what was measured, with bench.json and a figure beside it."""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vbon_jax.bench import engines, load, log_f, machine, models, plan, population, ppo, sampling
from vbon_jax.bench.machine import Row
from vbon_jax.errors import InputError, writing
from vbon_jax.models.lm import LanguageModel
from vbon_jax.progress import log
from vbon_jax.report import style


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all sections have in common.

    Attributes:
      given: the command line's options.
      model: that is measured.
      peak: the machine's rate of matrix products in the model's arithmetic, operations a second.
      out: folder of the results.
    """

    given: argparse.Namespace
    model: LanguageModel
    peak: float
    out: Path


def _machine(bench: Bench) -> Iterator[Row]:
    dtype = bench.model.config.compute_dtype
    yield Row("machine", f"matrix products, {dtype}", bench.peak / 1e9, "GFLOP/s")
    yield Row("machine", "memory, a copy", machine.copy_rate() / 1e9, "GB/s")


def _sampling(bench: Bench) -> Iterator[Row]:
    given = bench.given
    work = sampling.Work(given.rows, given.prompt, given.new, tuple(given.n))
    with ExitStack() as stack:
        path = stack.enter_context(engines.directory(bench.model)) if given.engine else ""
        others = {name: engines.ENGINES[name](path) for name in given.engine}
        found = sampling.draws(bench.model, work, given.repeats, others)
    yield from sampling.rows(found, bench.model.config, work, bench.peak, machine.copy_rate())
    draw(found, work).savefig(bench.out / "bench.png")


def _iteration(bench: Bench) -> Iterator[Row]:
    given, config = bench.given, bench.model.config
    work = ppo.Work(
        rows=given.rows, prompt=given.prompt, new=given.new, group=given.group,
        minibatch=min(ppo.Work.minibatch, given.rows),
    )  # fmt: skip
    for unfrozen in given.unfrozen:
        found = ppo.iteration_times(
            config, work, unfrozen, given.penalty, given.chunk, given.remat,
            config.compute_dtype, given.repeats,
        )  # fmt: skip
        what = "whole model" if unfrozen == -1 else f"{unfrozen} blocks"
        yield from ppo.rows(found, what, bench.peak)


def _log_f(bench: Bench) -> Iterator[Row]:
    del bench
    yield from log_f.rows(log_f.log_f_times() | log_f.ks_times())


def _population(bench: Bench) -> Iterator[Row]:
    del bench
    yield from population.rows(population.population_times())


def _loading(bench: Bench) -> Iterator[Row]:
    del bench
    for how, result in load.results():
        yield from load.rows(how, result)


def _memory(bench: Bench) -> Iterator[Row]:
    for name, result in plan.results(bench.given.config):
        yield from plan.rows(name, result)


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "machine": _machine,
    "sampling": _sampling,
    "iteration": _iteration,
    "log_f": _log_f,
    "population": _population,
    "loading": _loading,
    "memory": _memory,
}
DEFAULT = ("machine", "sampling", "iteration", "log_f", "population")


def draw(found: Mapping[str, Mapping[str, sampling.Drawn]], work: sampling.Work) -> "style.Figure":
    """Draws seconds a prompt against n: naive best-of-n, with a shared prefix, and the policy.

    Args:
      found: what `sampling.draws` returns.
      work: that was measured.
    """
    ours = found[sampling.OURS]
    figure = style.new_figure(6.0, 4.0)
    axes = figure.add_subplot()
    points = sampling.of_bon(ours)
    shared = [(n, drawn.each) for n, how, drawn in points if how != "naive"]
    (at, _, naive), *_ = points
    ns = sorted({1, at, *(n for n, _ in shared)})
    axes.plot(ns, [naive.each / at * n for n in ns], ":", color=style.BON_COLOR, label="naive BoN")
    axes.plot(*zip(*shared), "o-", color=style.BON_COLOR, label="BoN, shared prefix")
    for case, label, color in (
        ("policy", "policy, one sample", style.FIRST_COLOR),
        ("proposal", "corrected, a proposal", style.SECOND_COLOR),
    ):
        axes.axhline(ours[case].each, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    style.dress(
        axes,
        f"{work.prompt}-token prompts, responses of {work.new} tokens",
        "n",
        "seconds a prompt",
    )
    axes.legend(frameon=False, fontsize=9)
    return figure


def table(rows: Sequence[Row]) -> Table:
    """Makes the table for the screen."""
    shown = Table("", "what", title="vbon bench")
    shown.add_column("value", justify="right", no_wrap=True)
    shown.add_column("ratio", justify="right", no_wrap=True)
    shown.add_column("of")
    for section, of_it in itertools.groupby(rows, key=lambda row: row.section):
        shown.add_section()
        for i, row in enumerate(of_it):
            ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
            value = f"{row.value:,.4g} {row.unit}"
            shown.add_row("" if i else section, row.what, value, ratio, row.against)
    return shown


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vbon bench",
        description="Measures this machine's sampling and training. A figure is a median of "
        "repeats, in turns; its ratio is to what was measured beside it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", default=list(DEFAULT),
        help=f"any of {', '.join(SECTIONS)}")  # fmt: skip
    add(
        "--model", default="gpt2",
        help=f"{', '.join(models.MODELS)} (random weights), a directory, or owner/name on the hub"
    )  # fmt: skip
    add("--out", default="runs/bench", help="folder of bench.json and bench.png")
    add("--repeats", type=int, default=3, help="of each measurement")
    add("--rows", type=int, default=64, help="responses drawn at once, and in an iteration")
    add("--prompt", type=int, default=128, help="tokens of a prompt")
    add("--new", type=int, default=64, help="tokens of a response")
    add("--n", type=int, nargs="+", default=[2, 8, 32, 128], help="of best-of-n")
    add("--engine", action="append", choices=tuple(engines.ENGINES),
        help="also draw with it; may be repeated (default: those that are installed)")  # fmt: skip
    add("--unfrozen", type=int, nargs="+", default=[2, -1],
        help="iteration: upper blocks trained, -1 for the whole model")  # fmt: skip
    add("--group", type=int, default=1, help="iteration: responses to a prompt")
    add("--penalty", choices=("sampled", "full"), default="sampled", help="train.penalty")
    add("--remat", choices=("none", "dots", "full"), default="none", help="memory.remat")
    add("--chunk", type=int, default=1_024, help="memory.chunk")
    add("--config", default=plan.CONFIG, help="memory: config file of all keys not set there")
    return parser


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = _arguments()
    given = parser.parse_args(argv)
    for name in given.sections:
        if name not in SECTIONS:
            parser.error(f"{name!r} is no section: choose any of {', '.join(SECTIONS)}")
    for name in ("repeats", "prompt", "new"):
        if getattr(given, name) < 1:
            parser.error(f"--{name}={getattr(given, name)}: must be at least 1")
    if given.rows < 2:
        parser.error(f"--rows={given.rows}: must be at least 2")
    if min(given.n) < 2:
        parser.error(f"--n={min(given.n)}: must be at least 2")
    installed = engines.installed()
    for name in given.engine or ():
        if name not in installed:
            parser.error(f"--engine={name}: {engines.NEEDS[name]} is not installed")
    if given.engine is None:
        given.engine = installed
    return given


def main(argv: Sequence[str]) -> None:
    """Measures the sections that are asked for, and prints the table.

    bench.json is written after each section: what was measured is kept when the next is stopped.

    Args:
      argv: the command line's arguments after "bench".

    Raises:
      InputError: if there is no such model, or the folder can't be written.
      SystemExit: if an option is wrong; argparse has said so.
    """
    given = _read(argv)
    out, clock = Path(given.out), machine.CompileClock()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    model = models.load(given.model)
    for layers in given.unfrozen if "iteration" in given.sections else ():
        if layers != -1 and not 1 <= layers < model.config.layers:
            raise InputError(
                f"--unfrozen={layers}: {given.model} has {model.config.layers} layers: give 1 to "
                f"{model.config.layers - 1}, or -1 for the whole model"
            )
    bench = Bench(given, model, machine.matrix_rate(model.config.compute_dtype), out)
    report: dict[str, Any] = machine.description() | {"options": vars(given), "rows": []}
    rows: list[Row] = []
    for name in given.sections:
        log(f"bench: {name}")
        before = clock.seconds
        rows += SECTIONS[name](bench)
        rows.append(Row(name, "compilation", clock.seconds - before, "s"))
        report["rows"] = [dataclasses.asdict(row) for row in rows]
        with writing(out / "bench.json"):
            (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    Console().print(table(rows))
    log(f"bench: {out / 'bench.json'}")
