"""`python -m rlvlm_sandbox`: whether this machine can sandbox, a run, a server.

Exit status: 0 ok, 1 no backend holds or the program's outcome is another one, 2 bad input or no sandbox.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from rlvlm_sandbox.bubblewrap import LANGUAGES
from rlvlm_sandbox.images import IMAGES
from rlvlm_sandbox.records import PROFILES, Limits, Outcome, SandboxUnavailable
from rlvlm_sandbox.sandbox import BACKENDS, UNSAFE, Sandbox, probe
from rlvlm_sandbox.serve import Server, serve


async def _probe(image: str) -> int:
    reasons = {backend: await probe(backend, image) for backend in BACKENDS}
    for backend, reason in reasons.items():
        print(f"{backend}: {'holds' if reason is None else 'does not hold: ' + reason}")
    return 1 if all(reasons.values()) else 0


async def _run(options: argparse.Namespace) -> int:
    code = options.file.read_bytes()
    stdin = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
    async with Sandbox(options.backend, options.image, 1) as sandbox:
        limits = Limits(wall_s=options.wall, cpu_s=options.wall)
        run = await sandbox.run(code, stdin, options.profile, limits, options.language)
    sys.stdout.buffer.write(run.stdout)
    sys.stdout.flush()
    sys.stderr.buffer.write(run.stderr)
    used = f"{run.wall_s:.3f} s wall, {run.cpu_s:.3f} s cpu, {run.peak_rss_bytes >> 20} MiB, {run.backend}"
    print(f"{run.outcome}, exit code {run.exit_code}: {used} {run.detail}".rstrip(), file=sys.stderr)
    return 0 if run.outcome is Outcome.OK else 1


async def _serve(options: argparse.Namespace) -> int:
    token = None
    if options.token_env is not None:
        token = os.environ.get(options.token_env)
        if not token:
            raise ValueError(f"--token-env is {options.token_env!r}, which is not set in the environment; set it")
    async with Sandbox(options.backend, options.image, options.workers) as sandbox:
        server = Server(sandbox, options.host, options.port, workers=options.workers, queue=options.queue, token=token)
        await serve(server)
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{value} is no port")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlvlm_sandbox", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    probes = commands.add_parser("probe", help="run every backend's canary; exit status 0 if one holds")
    run = commands.add_parser("run", help="run FILE, with stdin as its stdin")
    run.add_argument("file", type=Path)
    run.add_argument("--wall", type=float, help="seconds (default: the profile's)")
    run.add_argument("--profile", choices=PROFILES, default="judge")
    run.add_argument("--language", choices=("python", *LANGUAGES), default="python")
    server = commands.add_parser("serve", help="run and grade programs for others, over HTTP")
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--port", type=_port, default=8080, help="0 takes a free one (default: %(default)s)")
    server.add_argument("--token-env", metavar="NAME", help="the environment variable with the token clients must send")
    server.add_argument("--workers", type=_count, default=os.cpu_count() or 1, help="runs at a time")
    server.add_argument("--queue", type=_count, default=256, help="requests that may wait (default: %(default)s)")
    for command in (run, server):
        command.add_argument("--backend", choices=("auto", *BACKENDS, UNSAFE), default="auto")
    for command in (probes, run, server):
        command.add_argument("--image", choices=IMAGES, default="py")
    return parser


def main() -> int:
    options = _parser().parse_args()
    command = {"probe": lambda: _probe(options.image), "run": lambda: _run(options), "serve": lambda: _serve(options)}
    try:
        return asyncio.run(command[options.command]())
    except (OSError, ValueError, SandboxUnavailable) as error:  # a file that is not there, a port that is taken
        print(f"rlvlm_sandbox {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
