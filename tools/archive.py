"""Many recorded videos on many machines, by Ray: one video a task, the weights once per worker.

Ray starts workers and finds places for them; here is what is to be done with a video, and what became of it. The
package, the videos and the output folder have to be at the same place on all machines.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import command, console, say
from demo import Outcome
from demo_run import Options, build, run_source
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eventful_det.errors import UserError, printable

ATTEMPTS = 2  # of a video whose worker dies


class Worker:
    """A process of the cluster, with a detector.

    Args:
        options: of the tool.
        sources: all of them; they tell which of the shipped weights are meant.
        argv: the command line.
    """

    def __init__(self, options: Options, sources: list[str | Path], argv: list[str]) -> None:
        sys.argv = argv  # results tell the command
        self.options = options
        try:
            self.known: Any = build(options, sources)
        except UserError as error:
            self.known = error

    def fault(self) -> UserError | None:
        """What keeps every video from being done."""
        return self.known if isinstance(self.known, UserError) else None

    def detect(self, source: str | Path, directory: Path) -> dict[str, Any] | UserError:
        """The results of a video, or what was wrong with it."""
        if isinstance(self.known, UserError):
            return self.known
        try:
            return run_source(self.options, self.known, source, directory)
        except UserError as error:
            return error


def finished(directory: Path) -> dict[str, Any] | None:
    """The results of an earlier run of the same command that reached the end of its video."""
    try:
        results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
        return results if (results["command"], results["stopped"]) == (command(), None) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def run_on_ray(options: Options, sources: Mapping[Path, str | Path]) -> Iterator[Outcome]:
    """Run each source into its folder on the workers of a Ray cluster, and yield what became of it.

    The cluster is that of RAY_ADDRESS or of this machine, or else one that is started here. Videos that the same
    command has done are not done again.

    Raises:
        UserError: Ray is not installed, there is no such cluster, or its workers cannot begin.
    """
    done = [Outcome(d, s, results) for d, s in sources.items() if (results := finished(d)) is not None]
    yield from done
    waiting = dict(sources)
    for outcome in done:
        del waiting[outcome.directory]
    if not waiting:
        return
    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("videos"), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress, cluster():
        bar = progress.add_task("", total=len(sources), completed=len(done))
        for outcome in _results(options, waiting):
            result = outcome.result
            if isinstance(result, dict):
                say(f"{outcome.source}: {result['frames']} frames, {result['share_of_dense']['total']:.0%} of dense")
            progress.advance(bar)
            yield outcome


@contextmanager
def cluster() -> Iterator[None]:
    """Connected to a cluster."""
    try:
        import ray
    except ImportError:
        raise UserError("on=ray needs the package ray: pip install ray") from None
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"on=ray: there is no cluster to work on ({_reason(error)})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _results(options: Options, sources: Mapping[Path, str | Path]) -> Iterator[Outcome]:
    """What became of each source, as they end."""
    import ray

    gpu = options.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    places = max(1, int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1)))
    make: Any = ray.remote(
        num_gpus=int(gpu),
        num_cpus=1,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},  # where the tools are
    )(Worker)

    def new_worker() -> Any:
        return make.remote(options, list(sources.values()), sys.argv)

    workers = [new_worker() for _ in range(min(places, len(sources)))]
    waiting, tasks, attempts = deque(sources.items()), {}, Counter[Path]()

    def hand_out(worker: Any) -> None:
        if waiting:
            directory, source = waiting.popleft()
            attempts[directory] += 1
            # Other machines have other working directories.
            path = source.resolve() if isinstance(source, Path) else source
            tasks[worker.detect.remote(path, directory.resolve())] = worker, directory

    try:
        if fault := ray.get(workers[0].fault.remote()):
            raise fault
        for worker in workers:
            hand_out(worker)
        while tasks:
            (task,), _ = ray.wait(list(tasks), num_returns=1)
            worker, directory = tasks.pop(task)
            source = sources[directory]
            try:
                result = ray.get(task)
            except ray.exceptions.RayError as error:
                result = UserError(f"{printable(str(source))}: its worker failed ({_reason(error)})")
                ray.kill(worker)  # Ray's own retries are lost on a worker that is still starting anew
                workers.remove(worker)
                # What our own code raised, it would raise again.
                again = attempts[directory] < ATTEMPTS and not isinstance(error, ray.exceptions.RayTaskError)
                if again:
                    waiting.appendleft((directory, source))
                if waiting:
                    workers.append(worker := new_worker())
                if again:
                    hand_out(worker)
                    continue
            hand_out(worker)
            yield Outcome(directory, source, result)
    except ray.exceptions.RayError as error:
        raise UserError(f"on=ray: the workers cannot begin ({_reason(error)})") from None
    finally:
        for worker in workers:
            ray.kill(worker)


def _reason(error: Exception) -> str:
    """One line of what Ray says: the last of a traceback, the first of anything else."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Traceback" in str(error) else 0]
