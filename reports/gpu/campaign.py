"""Steps in order of worth, each a command of its own within a limit, until the time is over."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, Literal

from helios_sim.errors import InputError, did_you_mean
from reports.forked import Child
from reports.gpu.packages import how_to_install, missing

ROOT: Final = Path(__file__).resolve().parents[2]
STEPS_FILE: Final = "steps.json"
GRACE_S: Final = 15.0
"""Time to export what was taken, between the signal that asks and the one that kills."""

_LOOK_S: Final = 0.1
"""How often whoever waits for a step looks for an interruption."""

Verdict = Literal["done", "failed", "out of time", "interrupted", "skipped"]


@dataclass(frozen=True)
class Call:
    """What a step's command is made of: the folder, the seconds of its work, its last command.

    `forks` says that children of a process that has imported torch can use the device.
    """

    out: Path
    work_s: float
    earlier: tuple[str, ...] = ()
    forks: bool = False


@dataclass(frozen=True)
class Step:
    """One command of the campaign.

    Its work gets a `share` of the whole budget, and starting and ending `extra_s` more; with less
    than `least_s` left it is not begun. It needs `packages` and what the steps `after` it comes
    leave: `leaves` is a pattern in the campaign's folder. `unsuited` says why it makes no sense
    here. `beside` is a command that runs along, on the processor. What `resumes` takes more each
    time, and is gone on with where that was too little for a step after it.
    """

    name: str
    words: Callable[[Call], Sequence[str]]
    extra_s: float
    least_s: float
    share: float = 0.0
    packages: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    leaves: str = ""
    unsuited: str = ""
    beside: tuple[str, ...] = ()
    resumes: bool = False


@dataclass(frozen=True)
class Try:
    """What came of a step once; `reason` says why where nothing was run or it was cut short."""

    step: str
    verdict: Verdict
    reason: str = ""
    command: tuple[str, ...] = ()
    rc: int | None = None
    seconds: float = 0.0
    limit_s: float | None = None
    began_at: str = ""
    log: str = ""


def chosen(steps: Sequence[Step], only: Sequence[str], skip: Sequence[str]) -> list[Step]:
    """The wanted steps in their order; raises `InputError` for a name that is none."""
    names = [step.name for step in steps]
    for option, given in (("--only", only), ("--skip", skip)):
        for name in given:
            if name not in names:
                raise InputError(
                    f"There is no step {name!r}.{did_you_mean(name, names)} There are "
                    f"{', '.join(names)}.",
                    option,
                )
    return [step for step in steps if step.name not in skip and (not only or step.name in only)]


class Campaign:
    """One call: what earlier calls left in the folder, the time, and what comes of each step.

    `after_each` is done after every step that was run.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        out: Path,
        budget_s: float,
        *,
        began_s: float | None = None,
        margin_s: float = 0.0,
        grace_s: float = GRACE_S,
        say: Callable[[str], None] = print,
        forks: bool = True,
        after_each: Callable[[], None] = lambda: None,
    ) -> None:
        self.steps, self.out, self.budget_s = steps, out.resolve(), budget_s
        self.ends_s = (time.monotonic() if began_s is None else began_s) + budget_s - margin_s
        self.grace_s, self.say, self.forks = grace_s, say, forks
        self.after_each = after_each
        self.order = [step.name for step in steps]
        self.tries = self._earlier_tries()
        self.results: list[Try] = []
        self.interruptions = 0
        self._holds_them = False

    @property
    def left_s(self) -> float:
        """Seconds until the steps must have ended."""
        return self.ends_s - time.monotonic()

    def run(self, wanted: Sequence[Step]) -> None:
        """Run what is wanted and not done; an interruption passes through once it is on disk."""
        # A shell that starts this in the background has signals ignored, and commands inherit it.
        previous = signal.signal(signal.SIGINT, self._interrupted)
        terminating = signal.signal(signal.SIGTERM, self._interrupted)
        try:
            for step in wanted:
                self._step(step)
        finally:
            signal.signal(signal.SIGINT, previous)
            signal.signal(signal.SIGTERM, terminating)

    def exit_code(self) -> int:
        """0 with every wanted step done, 1 where one failed or lacks something, 3 out of time."""
        # What makes no sense on this device is not wanted here.
        unsuited = {step.name for step in self.steps if step.unsuited}
        found = {one.verdict for one in self.results if one.step not in unsuited}
        if "failed" in found:
            return 1
        if "out of time" in found:
            return 3
        return 0 if found <= {"done"} else 1

    def _interrupted(self, number: int, frame: object) -> None:
        """Pass an interruption through; while a step is in hand, note it for whoever waits."""
        self.interruptions += 1
        if not self._holds_them:
            raise KeyboardInterrupt

    @contextmanager
    def _interruptions_held(self) -> Iterator[None]:
        """Pass interruptions through at the end alone: nothing begun is left, nor unrecorded."""
        self.interruptions, self._holds_them = 0, True
        try:
            yield
        finally:
            self._holds_them = False
        if self.interruptions:
            raise KeyboardInterrupt

    def _step(self, step: Step) -> None:
        last = self._last(step.name)
        begun = self._last_begun(step.name)
        is_new = any(self._last_begun(name) > begun for name in step.after)
        stale = is_new or (step.resumes and self._was_too_little(step))
        if last and last.verdict == "done" and not stale:
            if self._leaves(step):
                self.say(f"{step.name} is done; it is not repeated.")
            else:
                # Made anew it would differ from what later steps were given, as weights do.
                gone = f"what it left is gone ({step.leaves}); bring it back or give another --out"
                self.say(f"{step.name} is done, but {gone}.")
                last = Try(step.name, "skipped", gone)
            self.results.append(last)
            return
        if verdict := self._hindered(step):
            self.say(f"{step.name}: {verdict.verdict}: {verdict.reason}.")
            self._keep(verdict)
            return
        extra_s = min(step.extra_s, self.left_s)
        work_s = max(0.0, min(step.share * self.budget_s, self.left_s - extra_s))
        # A try that was not begun says nothing of how the step was gone about.
        earlier = () if begun < 0 or stale else self.tries[begun].command
        try:
            words = tuple(step.words(Call(self.out, work_s, earlier, self.forks)))
        except (InputError, ImportError, OSError) as error:
            self._keep(Try(step.name, "failed", str(error)))
            return
        with self._interruptions_held():
            self._run(step, words, extra_s + work_s)

    def _last(self, name: str) -> Try | None:
        return next((one for one in reversed(self.tries) if one.step == name), None)

    def _last_begun(self, name: str) -> int:
        """The place of a step's last try that ran a command; -1 where none did."""
        places = (k for k, one in enumerate(self.tries) if one.step == name and one.command)
        return max(places, default=-1)

    def _was_too_little(self, step: Step) -> bool:
        """Whether a step after this one failed on what it left."""
        after = [self._last(one.name) for one in self.steps if step.name in one.after]
        return any(one is not None and one.verdict == "failed" for one in after)

    def _hindered(self, step: Step) -> Try | None:
        """Why a step is not begun; None where nothing is in its way."""
        if step.unsuited:
            return Try(step.name, "skipped", step.unsuited)
        if absent := missing(step.packages):
            return Try(step.name, "skipped", how_to_install(absent).rstrip("."))
        for name in step.after:
            source = next(one for one in self.steps if one.name == name)
            if not self._leaves(source):
                return Try(step.name, "skipped", f"{name} has left nothing to go on with")
        if self.left_s < step.least_s:
            left = f"{max(0.0, self.left_s):.0f} s are left and it takes {step.least_s:.0f} s"
            return Try(step.name, "out of time", f"{left} at least")
        return None

    def _leaves(self, step: Step) -> bool:
        return not step.leaves or any(self.out.glob(step.leaves))

    def _run(self, step: Step, words: tuple[str, ...], limit_s: float) -> None:
        """Run one command to its end or its limit, its output on the terminal and in a file."""
        log = self.out / "logs" / f"{self.order.index(step.name) + 1:02}-{step.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.say(f"{step.name}, {limit_s:.0f} s at most: {shlex.join(words)}")
        grace_s = min(self.grace_s, limit_s / 4)
        began_s, began_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        verdict, reason = "failed", ""
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(words)}\n".encode())
            beside = self._beside(step, log)
            try:
                process = _begun(words, self.forks)
                assert process.stdout is not None
                tee = threading.Thread(target=_tee, args=(process.stdout, file), daemon=True)
                tee.start()
                if self._waited(process, limit_s - grace_s, 1):
                    pass
                elif self.interruptions:
                    verdict, reason = "interrupted", "it was ended by hand"
                else:
                    verdict, reason = "out of time", f"it was ended at its limit of {limit_s:.0f} s"
                rc = self._ended(process, grace_s)
                tee.join(2.0)
            finally:
                if beside is not None:
                    self._ended(beside, 0.0)
        if rc == 0:
            verdict, reason = "done", ""
        elif verdict == "failed":
            reason = f"it ended with code {rc}"
        seconds = round(time.monotonic() - began_s, 1)
        where = log.relative_to(self.out).as_posix()
        told = (reason, words, rc, seconds, round(limit_s, 1), began_at, where)
        self._keep(Try(step.name, verdict, *told))  # type: ignore[arg-type]
        self.say(f"{step.name}: {verdict} after {seconds:.0f} s{reason and f', {reason}'}.")
        self.after_each()

    def _waited(self, process: Process, seconds: float, interruptions: int) -> bool:
        """Whether a command has ended within a time, and before so many interruptions."""
        end_s = time.monotonic() + seconds
        while self.interruptions < interruptions:
            left_s = end_s - time.monotonic()
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(_LOOK_S, max(0.0, left_s)))
                return True
            if left_s <= 0.0:
                break
        return process.poll() is not None

    def _ended(self, process: Process, grace_s: float) -> int:
        """End a command and all that it started; those that still run are asked first."""
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            # Whoever interrupts once more does not care for what could be exported.
            self._waited(process, grace_s, self.interruptions + 1)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def _beside(self, step: Step, log: Path) -> subprocess.Popen[bytes] | None:
        if not step.beside:
            return None
        with log.with_suffix(".beside.log").open("ab") as file:
            return _started(step.beside, file)

    def _earlier_tries(self) -> list[Try]:
        path = self.out / STEPS_FILE
        if not path.is_file():
            return []
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return [Try(**{**one, "command": tuple(one["command"])}) for one in found]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"The steps so far cannot be read ({error}).", str(path)) from error

    def _keep(self, one: Try) -> None:
        """Put what came of a step on disk, a line a try, before the next begins."""
        self.results.append(one)
        self.tries.append(one)
        lines = ",\n".join(json.dumps(asdict(each)) for each in self.tries)
        path = self.out / STEPS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        fresh.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        fresh.replace(path)


Process = subprocess.Popen[bytes] | Child


def _begun(words: Sequence[str], forks: bool) -> Process:
    """A command whose output is to be read; a module is a child, which begins sooner."""
    if forks and list(words[:2]) == [sys.executable, "-m"]:
        return Child(words[2], words[3:], ROOT, _environment())
    return _started(words, subprocess.PIPE)


def _environment() -> dict[str, str]:
    """What a step's environment has beside this one's."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    # Plugins that happen to be installed are not what the tests are about.
    more["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return more


def _started(words: Sequence[str], output: int | BinaryIO) -> subprocess.Popen[bytes]:
    """A command in a group of its own, so that a signal reaches all that it starts."""
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=os.environ | _environment(),
        start_new_session=True,
    )


def _tee(source: BinaryIO, file: BinaryIO) -> None:
    """Copy what a command says as it says it."""
    with source:
        while data := os.read(source.fileno(), 65536):
            file.write(data)
            file.flush()
            # A terminal that is gone does not end the step.
            with suppress(OSError, ValueError):
                sys.stdout.write(data.decode(errors="replace"))
                sys.stdout.flush()
