"""`python -m rlvlm_sandbox probe` says whether this machine can sandbox; `run FILE` runs a program in it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from rlvlm_sandbox.records import Limits, Outcome, SandboxUnavailable
from rlvlm_sandbox.sandbox import BACKENDS, Sandbox, probe


async def _probe() -> int:
    reasons = {backend: await probe(backend) for backend in BACKENDS}
    for backend, reason in reasons.items():
        print(f"{backend}: {'holds' if reason is None else 'does not hold: ' + reason}")
    return 1 if all(reasons.values()) else 0


async def _run(file: Path, wall_s: float, fork: bool) -> int:
    stdin = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
    try:
        async with Sandbox() as sandbox:
            run = await sandbox.run(file.read_bytes(), stdin, Limits(wall_s=wall_s, fork=fork))
    except SandboxUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.buffer.write(run.stdout)
    sys.stderr.buffer.write(run.stderr)
    used = f"{run.wall_s:.3f} s wall, {run.cpu_s:.3f} s cpu, {run.peak_rss_bytes >> 20} MiB"
    print(f"{run.outcome}, exit code {run.exit_code}: {used} {run.detail}".rstrip(), file=sys.stderr)
    return 0 if run.outcome is Outcome.OK else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="rlvlm_sandbox", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("probe", help="run every backend's canary; exit status 0 if one holds")
    run = commands.add_parser("run", help="run FILE; exit status 0 ok, 1 any other outcome, 2 no sandbox here")
    run.add_argument("file", type=Path)
    run.add_argument("--wall", type=float, default=Limits().wall_s, help="seconds (default: %(default)s)")
    run.add_argument("--fork", action="store_true", help="let it start processes")
    arguments = parser.parse_args()
    if arguments.command == "probe":
        return asyncio.run(_probe())
    return asyncio.run(_run(arguments.file, arguments.wall, arguments.fork))


if __name__ == "__main__":
    sys.exit(main())
