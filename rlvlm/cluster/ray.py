"""Several ranks as Ray actors, on this machine or on a cluster that Ray already runs on.

A rank that raises, dies or hangs ends all of them: the others wait for it in a collective and would wait for ever. What
reaches the caller is the first cause, not what its end did to the others.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rlvlm.cluster.local import free_port, rank_environment
from rlvlm.recipe.errors import RecipeError, RlvlmError, RunError

_GRACE_S = 5.0  # for the other ranks, once one has failed: theirs may be the cause, and the first one's its effect
_ROOM_S = 60.0  # until a cluster that already runs has room for all ranks
_STORE_GIB = 1.0  # of shared memory, used as batches pass through; Ray writes to disk what does not fit
_STORE_SHARE = 0.05  # of the machine's memory, where that is more
_LONGEST_FOLDER = 40  # Ray opens sockets below it, and a socket's path may have 107 characters
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAST = 2000  # characters of what a rank said before it died
# What CPython's fault handler, which Ray turns on in its workers, writes on standard error.
_FATAL = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Floating-point exception": "SIGFPE",
    "Illegal instruction": "SIGILL",
}


class RankDied(RunError):
    """The process of a rank is gone, or does not answer."""


class RankRaised(Exception):
    """A rank raised what is no RlvlmError: a bug. The message is the rank's own traceback."""


@dataclass(frozen=True, slots=True)
class _Raised:
    """What a rank raised, and when (seconds since the epoch)."""

    error: RlvlmError | None  # the error itself where it is one of ours
    told: str  # the traceback
    at: float


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rank's process is. log: its standard error."""

    host: str
    pid: int
    log: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def here(self) -> bool:
        return self.host == _host()


class _Rank:
    """The actor: holds the object of one rank."""

    _object: Any

    def place(self) -> _Place:
        return _Place(_host(), os.getpid(), os.readlink("/proc/self/fd/2"))

    def free_port(self) -> int:
        return free_port()

    def begin(self, make: bytes, path: Sequence[str], environment: Mapping[str, str]) -> Any:
        """Builds the object. make: pickled, because it may need `path`, the modules' path of the caller."""
        sys.path += [folder for folder in path if folder not in sys.path]
        os.environ.update(environment)
        _end_with_parent()
        return self._outcome(lambda: setattr(self, "_object", pickle.loads(make)()))

    def call(self, method: str, *arguments: Any) -> Any:
        return self._outcome(lambda: getattr(self._object, method)(*arguments))

    def _outcome(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - crosses to the caller, who raises it
            told = traceback.format_exc()
            return _Raised(error if isinstance(error, RlvlmError) else None, told, time.time())


class RayRanks:
    """`ranks` Ray actors, each with the object that `make()` gives there, one GPU each where there are GPUs.

    address: of the Ray cluster to join; None for the one that RAY_ADDRESS names, or else one of our own on this
    machine. port: where the ranks' process group meets on the machine of rank 0, 0 for one that is free. limit_s: how
    long the start or a call may take.

    Raises RecipeError if Ray is not installed or the cluster has too little room; RankDied if a rank is killed or does
    not answer in time; the RlvlmError that a rank raised; RankRaised for any other exception of a rank. After any of
    these no rank is left.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        ranks: int,
        *,
        limit_s: float,
        port: int = 0,
        address: str | None = None,
    ) -> None:
        self.size = ranks
        self.limit_s = limit_s
        self._actors: list[Any] = []
        self._places: list[_Place] = []
        self._kills = _memory_kills()
        self._cluster = _Cluster(ranks, address)
        try:
            self._start(make, port)
        except BaseException:  # Ctrl-C too: nothing may stay behind
            self.close()
            raise

    def _start(self, make: Callable[[], Any], port: int) -> None:
        import cloudpickle
        import ray

        actor, gpu = self._cluster.actor(_Rank)
        self._actors = [actor.remote() for _ in range(self.size)]
        self._places = self._gather([one.place.remote() for one in self._actors], "start")
        hosts = [place.host for place in self._places]
        address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
        port = port or ray.get(self._actors[0].free_port.remote())
        made = cloudpickle.dumps(make)
        work = []
        for rank, (one, host) in enumerate(zip(self._actors, hosts, strict=True)):
            local = 0 if gpu else hosts[:rank].count(host)  # Ray shows each actor its own GPU only
            environment = rank_environment(rank, self.size, address, port, local, hosts.count(host))
            work.append(one.begin.remote(made, sys.path, environment))
        self._gather(work, "start")

    def call(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        """Calls the objects' `method` on all ranks at once. arguments: each a sequence with one value a rank. Gives
        the results by rank."""
        if not self._actors:
            raise RunError("the ranks have ended", mend="start the run again with --resume")
        for values in arguments:
            assert len(values) == self.size, f"{method}: {len(values)} values for {self.size} ranks"
        dealt = zip(*arguments, strict=True) if arguments else [()] * self.size
        work = [one.call.remote(method, *given) for one, given in zip(self._actors, dealt, strict=True)]
        try:
            return self._gather(work, method)
        except BaseException:  # a Ctrl-C leaves the ranks in the middle of a collective: they are of no more use
            self.close()
            raise

    def _gather(self, work: list[Any], doing: str) -> list[Any]:
        """The results by rank, or the first cause of a failure."""
        import ray

        pending = {reference: rank for rank, reference in enumerate(work)}
        results: dict[int, Any] = {}
        failures: list[tuple[int, _Raised | ray.exceptions.RayError]] = []
        end = time.monotonic() + self.limit_s
        while pending:
            done, _ = ray.wait(list(pending), timeout=max(end - time.monotonic(), 0))
            if not done:
                break
            for reference in done:
                rank = pending.pop(reference)
                results[rank] = _result(reference)
                if isinstance(results[rank], _Raised | ray.exceptions.RayError):
                    end = end if failures else min(end, time.monotonic() + _GRACE_S)
                    failures.append((rank, results[rank]))
        if failures:
            raise self._cause(failures, doing)
        if pending:
            raise self._hung(sorted(pending.values()), doing)
        return [results[rank] for rank in range(self.size)]

    def _cause(self, failures: Sequence[tuple[int, Any]], doing: str) -> Exception:
        """The failure that the others come from: a death, else what was raised first."""
        for rank, failure in failures:
            if not isinstance(failure, _Raised):
                return self._died(rank, str(failure), doing)
        rank, raised = min(failures, key=lambda failure: failure[1].at)
        if raised.error is not None:
            return raised.error
        return RankRaised(f"rank {rank} of {self.size} ({self._where(rank)}), in `{doing}`:\n{raised.told}")

    def _died(self, rank: int, told: str, doing: str) -> RankDied:
        how, mend = self._how(rank, told)
        return RankDied(f"rank {rank} of {self.size} ({self._where(rank)}) {how}, in `{doing}`", mend)

    def _how(self, rank: int, told: str) -> tuple[str, str]:
        """How a rank ended, by what Ray says of it, its own standard error and the kernel; and what to do."""
        less = "give learner.zero_stage=3, learner.offload=optimizer, a smaller learner.row_tokens or more ranks"
        again = "`--resume` goes on from the last checkpoint"
        log = self._log(rank)
        said = f"{again}. The last that it said:\n{log[-_LAST:]}" if log else again
        crash = next((name for words, name in _FATAL.items() if f"Fatal Python error: {words}" in log), None)
        if crash:
            return f"crashed ({crash})", said
        if "OutOfMemory" in told or "low on memory" in told:
            return "was killed by Ray, because the machine's memory was full", less
        if "SIGTERM" in told:
            return "was ended from outside (SIGTERM)", again
        if "exit code" in told:
            return f"ended itself with {told[told.index('exit code') :].split('.')[0]}", said
        if _memory_kills() > self._kills:
            return "was killed (SIGKILL) by the kernel, because the machine's memory was full", less
        if "End of file" in told:
            return "was killed (SIGKILL) from outside", again
        return f"was lost ({' '.join(told.split())})", said

    def _hung(self, silent: Sequence[int], doing: str) -> RankDied:
        ranks = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))} of {self.size}"
        return RankDied(
            f"{ranks} did not answer within {self.limit_s:g} s, in `{doing}`",
            mend="if a step may take this long give a larger learner.limit_s; else a collective hangs: look at the "
            "network between the machines",
        )

    def _where(self, rank: int) -> str:
        return str(self._places[rank]) if self._places else "not started yet"

    def _log(self, rank: int) -> str:
        """The rank's standard error, where it can be read from here."""
        if not self._places or not self._places[rank].here:
            return ""
        lines = Path(self._places[rank].log).read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if not line.startswith((":job_id:", ":actor_name:")))

    def close(self) -> None:
        """Ends all ranks, and Ray where it was started here. Returns when their processes are gone."""
        import ray

        actors, self._actors = self._actors, []
        for one in actors:
            ray.kill(one)
        self._cluster.close()
        for place in self._places:
            if place.here:
                _wait_for_end(place.pid)
        self._places = []


class _Cluster:
    """Ray itself: started here for this process alone, or joined, or as this process has it already; and room for the
    ranks in it."""

    def __init__(self, ranks: int, address: str | None) -> None:
        try:
            import ray
        except ImportError:
            raise RecipeError(
                "learner.ranks",
                ranks,
                "several ranks need Ray, which is not installed",
                "install rlvlm[ray], or give learner.ranks=1",
            ) from None
        self._ranks = ranks
        self._folder: Path | None = None
        self._room: Any = None
        self._connected = not ray.is_initialized()
        if not self._connected:
            return
        address = address or os.environ.get("RAY_ADDRESS")
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # else Ray warns of what it will do in the future
        if address:
            self._join(address, quiet)
            return
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self._folder = _short_folder()
        ray.init(
            address="local",
            num_cpus=max(ranks, os.cpu_count() or 1),
            include_dashboard=False,
            _system_config={"worker_niceness": 0},  # Ray's own 15 gives the ranks what the rollout engine leaves over
            object_store_memory=int(max(_STORE_GIB * 2**30, _STORE_SHARE * psutil.virtual_memory().total)),
            _temp_dir=str(self._folder),
            **quiet,
        )

    def _join(self, address: str, quiet: Mapping[str, Any]) -> None:
        import ray

        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise RecipeError(
                "learner.ray_address",
                address,
                f"no Ray cluster can be joined there ({' '.join(str(error).split())})",
                "start one with `ray start --head`; where it wants a token, set RAY_AUTH_MODE=token",
            ) from None

    def actor(self, kind: type) -> tuple[Any, bool]:
        """The actor class, placed as close together as the cluster allows, and whether each has a GPU."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        gpu = ray.cluster_resources().get("GPU", 0) > 0
        needs = {"CPU": 1.0, "GPU": 1.0} if gpu else {"CPU": 1.0}
        self._room = placement_group([needs] * self._ranks, strategy="PACK")
        if not self._room.wait(_ROOM_S):
            free = {name: ray.available_resources().get(name, 0) for name in needs}
            raise RecipeError(
                "learner.ranks",
                self._ranks,
                f"needs as many {' and as many '.join(f'{name}s' for name in needs)}, and Ray has "
                f"{' and '.join(f'{count:g} {name}s' for name, count in free.items())} free",
                "give fewer ranks, or a larger Ray cluster",
            )
        where = PlacementGroupSchedulingStrategy(self._room)
        options = {"num_cpus": 1, "num_gpus": int(gpu), "max_restarts": 0, "scheduling_strategy": where}
        return ray.remote(**options)(kind), gpu

    def close(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        if self._room is not None and ray.is_initialized():
            remove_placement_group(self._room)
            self._room = None
        if self._connected:
            ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _result(reference: Any) -> Any:
    """A rank's result, or what ended it."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return error


def _host() -> str:
    """This machine's address as Ray's nodes know each other."""
    import ray

    return str(ray.util.get_node_ip_address())


def _short_folder() -> Path:
    """A folder for Ray's files and sockets. Raises RunError if no folder has a short enough path."""
    for parent in (tempfile.gettempdir(), "/tmp", "/dev/shm"):
        if len(parent) <= _LONGEST_FOLDER and os.access(parent, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="rlvlm-ray-", dir=parent))
    raise RunError(
        f"Ray needs a folder for temporary files whose path has at most {_LONGEST_FOLDER} characters, and "
        f"{tempfile.gettempdir()} has more",
        mend="set TMPDIR to a short path that can be written",
    )


def _end_with_parent() -> None:
    """Ray's daemon, this process's parent, ends with the process that started it; a rank in a collective would not
    notice, and wait for ever."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _memory_kills() -> int:
    """How many processes the kernel has killed so far because memory was full."""
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counters.get("oom_kill", 0))


def _wait_for_end(pid: int, patience_s: float = 10.0) -> None:
    """Ends a process of our own that does not end when it is told to."""
    deadline = time.monotonic() + patience_s
    while _runs(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)  # nobody may be there to take note of its end
    except psutil.NoSuchProcess:
        return False
