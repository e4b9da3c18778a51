"""`ulysses-triton doctor`: whether a machine, or all ranks of torchrun together, are fit for this library.

Facts are gathered (`doctor_facts`) and judged (`doctor_checks`, `doctor_ranks`), then ranks try it (`doctor_stages`).
After each stage all ranks have heard what all others found; rank 0 prints it, and its verdict is that of all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from .doctor_checks import FAIL, SKIPPED, TOPICS, WARNING, Check, machine
from .doctor_facts import Facts, gather
from .doctor_ranks import across, merged, named
from .doctor_stages import Ranks, Stages, name_of
from .errors import OptionError
from .group import EXCHANGES

SCHEMA = 1  # of what --json prints: raised when a field goes or means something else
_NO_ANSWER = "see what that rank printed, and whether its host is up and reaches MASTER_ADDR; raise --timeout if slow"

_DESCRIPTION = """\
Say whether this machine is fit: its system and limits, packages and whether they fit each other, GPUs, links, what
would be chosen and why, and a few layers against fp64. Under torchrun also whether all ranks have the same, and how
fast rows travel between them:

    torchrun --nproc-per-node 4 -m ulysses_triton.cli doctor

Exit status: 0 fit, 1 not fit (something would make a call fail or be wrong), 2 wrong use; the same on every rank.
"""


@dataclass(frozen=True)
class Report:
    """What was found on all ranks. `facts` in rank order, None of those that gave none."""

    checks: tuple[Check, ...]
    facts: tuple[Facts | None, ...]

    @property
    def fit(self) -> bool:
        return not any(check.status == FAIL for check in self.checks)

    def json(self) -> str:
        checks = [dataclasses.asdict(check) for check in self.checks]
        facts = [facts and dataclasses.asdict(facts) for facts in self.facts]
        whole = {"schema": SCHEMA, "fit": self.fit, "ranks": len(facts), "checks": checks, "facts": facts}
        return json.dumps(whole, indent=1)

    def text(self) -> str:
        count = len(self.facts)
        failed = [f"{check.topic}: {check.name}{_who(check, count)}" for check in self.checks if check.status == FAIL]
        warnings = sum(check.status == WARNING for check in self.checks)
        verdict = f"NOT fit: {'; '.join(failed)}" if failed else "Fit"
        return f"{text(self.checks, count)}\n\n{verdict} ({warnings} warning{'s' * (warnings != 1)})."


def text(checks: Sequence[Check], ranks: int = 1) -> str:
    """A line for each check, by topic, and one for what to do about it."""
    lines: list[str] = []
    for topic in TOPICS:
        own = [check for check in checks if check.topic == topic]
        lines += ["", topic] if own else []
        for check in own:
            who = _who(check, ranks) if check.status in (WARNING, FAIL) else ""
            lines.append(f"  {check.status:8} {check.name}{who}: {check.found}")
            lines += [f"           -> {check.remedy}"] if check.remedy else []
    return "\n".join(lines[1:])


def _who(check: Check, ranks: int) -> str:
    return f" ({named(check.ranks)})" if 0 < len(check.ranks) < ranks else ""


class _Examination:
    """One run on one rank: its stages, and what all ranks found in them."""

    def __init__(self, ranks: Ranks, debug: bool) -> None:
        self.ranks, self._debug = ranks, debug
        self.found: list[tuple[int, Sequence[Check]]] = []
        self.broken = ""  # the stage after which ranks do nothing together any more

    def stage(self, topic: str, name: str, work: Callable[[], list[Check]]) -> None:
        """Do it on all ranks, unless one could not do an earlier one; all then have what all found."""
        if self.broken:
            self.add([Check(topic, name, SKIPPED, f"not tried, after what was found in: {self.broken}")])
            return
        raised = False
        try:
            mine = work()
        except Exception as error:
            if self._debug:
                traceback.print_exception(error)
            raised = True
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            mine = [Check(topic, name, FAIL, said, "see the message; --debug prints all of it")]
        own = json.dumps([raised, [dataclasses.asdict(check) for check in mine]])
        for rank, answer in enumerate(self.ranks.share(name, own)):
            if answer is None:
                self.add([Check(topic, name, FAIL, "no answer", _NO_ANSWER, (rank,))])
                self.broken = name
                continue
            stopped, checks = json.loads(answer)
            self.broken = name if stopped else self.broken
            self.found.append((rank, [Check(**{**c, "ranks": tuple(c["ranks"])}) for c in checks]))

    def add(self, checks: list[Check]) -> None:
        """What every rank finds for itself and alike."""
        self.found += [(rank, checks) for rank in range(self.ranks.size)]

    def compare(self, facts: Facts | None) -> tuple[Facts | None, ...]:
        """Every rank's facts, and what they say together."""
        texts = self.ranks.share("their values", "" if facts is None else facts.text())
        every = tuple(Facts.of(json.loads(text)) if text else None for text in texts)
        known = [facts for facts in every if facts is not None]
        if len(known) < self.ranks.size:
            self.broken = self.broken or "facts"
        elif self.ranks.size > 1:
            checks = across(known)
            self.add(checks)
            if any(check.name == "devices" for check in checks):
                self.broken = self.broken or "devices"
        return every


def examine(ranks: Ranks, exchange: str = "auto", *, debug: bool = False) -> Report:
    """Examine this machine together with the other ranks: the same report on every one that comes to the end."""
    gathered: list[Facts] = []

    def own() -> list[Check]:
        gathered.append(gather())
        return machine(gathered[0])

    run = _Examination(ranks, debug)
    run.stage("system", "facts", own)
    facts = run.compare(gathered[0] if gathered else None)
    on_gpu = bool(gathered and gathered[0].gpus)
    stages = Stages(ranks, torch.device("cuda", gathered[0].local_rank) if on_gpu else torch.device("cpu"), exchange)
    run.stage("ranks", "process group", stages.join)
    run.stage("ranks", "exchange", stages.exchanges)
    for case in stages.cases():
        run.stage("self-test", name_of(case), partial(stages.layer, case))
    if dist.is_initialized() and not run.broken:
        dist.destroy_process_group()
    return Report(tuple(merged(run.found)), facts)


def _alone(error: Exception) -> Report:
    """Of a rank that does not reach the others' store."""
    facts = gather()
    said = f"no store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({' '.join(str(error).split())})"
    remedy = "see whether rank 0 runs, and whether its host and port can be reached from here"
    return Report((*machine(facts), Check("ranks", "meeting", FAIL, said, remedy, (facts.rank,))), (facts,))


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `doctor` with the command's subparsers."""
    parser = commands.add_parser(
        "doctor",
        help="whether this machine is fit: packages, GPUs, links, and layers against fp64",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with what was measured, instead")
    takes = [name for name in EXCHANGES if name != "two_hop"]  # which needs a mesh of nodes
    parser.add_argument("--exchange", choices=takes, default="auto", help="to try (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", default=120.0,
        help="how long ranks wait for each other (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--debug", help="print the tracebacks of errors", action="store_true")


def command(arguments: argparse.Namespace) -> int:
    """Run the command on this rank; returns the exit status."""
    if not 0 < arguments.timeout < float("inf"):
        raise OptionError(f"--timeout {arguments.timeout}; it must be a number of seconds above 0")
    timeout = timedelta(seconds=arguments.timeout)
    try:
        ranks = Ranks.meet(timeout)
    except RuntimeError as error:  # no other rank hears of it, so this one says it
        print(_alone(error).text(), file=sys.stderr, flush=True)
        return 1
    report = examine(ranks, arguments.exchange, debug=arguments.debug)
    if ranks.rank == 0:
        print(report.json() if arguments.json else report.text(), flush=True)
    fit = ranks.agreed(report.fit)
    if fit is None:
        print(f"ulysses-triton doctor: rank {ranks.rank}: no verdict from rank 0\n{report.text()}", file=sys.stderr)
    return 0 if fit else 1
