"""python -m standalone up | demo | check-migrations: the service on one machine, in one command."""

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from core.catalog import task_of
from standalone import base_model
from standalone.demo import print_verdict, walk
from standalone.process import StackError
from standalone.progress import clock, say
from standalone.stack import ROOT, Stack
from store.settings import Settings

_API_PORT = 8000
_SERVING_PORT = 8001


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    try:
        code: int = arguments.run(arguments)
        return code
    except StackError as error:
        sys.stderr.write(f"strop: {error}\n")
        return 1
    except KeyboardInterrupt:
        say("\nstopped; the data stays")
        return 0 if arguments.command == "up" else 130


def up(arguments: argparse.Namespace) -> int:
    """Start everything, print where it is, watch it until told to stop."""
    settings = Settings()
    home = arguments.home or settings.home
    models = (settings.models or home / "models").absolute()
    if base_model.is_in_a_wheel() and not settings.hub:
        base_model.make_base_model(models)
    stack = Stack(
        home,
        settings={"STROP_MODELS": str(models), "STROP_BASES": ",".join(settings.bases) or _every_text_model(models)},
        api_port=arguments.api_port,
        serving_port=arguments.serving_port,
        database_url=settings.database_url or None,
        redis_url=settings.redis_url if "redis_url" in settings.model_fields_set else None,
        folder=Path.cwd(),
    )
    say("starting ...")
    with stack:
        say(
            f"control plane       {stack.api_url}   (pages: {stack.api_url}/docs)\n"
            f"inference endpoint  {stack.serving_url}\n"
            f"API key             in {stack.api_key_file}\n"
            f"logs                in {stack.logs}\n"
            f"Ctrl-C stops everything; the data stays in {stack.home}."
        )
        stack.supervise(say)
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """The main job in a home of its own, on free ports; exit code 0 when every check passed."""
    started = time.monotonic()
    home = (arguments.home or Settings().home).absolute()
    models = home / "models"
    say(f"model     {base_model.NAME} in {base_model.make_base_model(models)}")
    overrides = {"STROP_MODELS": str(models), "STROP_BASES": base_model.NAME, "STORAGE_URL": ""}
    stack = Stack(home / "demo", settings=overrides)
    stack.wipe()
    with stack:
        say(f"stack     up after {clock(time.monotonic() - started)}; logs in {stack.logs}")
        checks = walk(stack)
    passed = print_verdict(checks)
    say(f"\n{'passed' if passed else 'FAILED'} in {clock(time.monotonic() - started)}; everything is stopped")
    return 0 if passed else 1


def check_migrations(_: argparse.Namespace) -> int:
    """`alembic check` against a fresh database that the migrations built: do they and the tables say the same?"""
    with tempfile.TemporaryDirectory(prefix="strop-") as folder:
        stack = Stack(Path(folder) / "home", services=(), redis_url="redis://unused", folder=ROOT)
        with stack:
            stack.run_setup("-m", "alembic", "check")
    say("migrations and tables agree")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m standalone", description="strop on one machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    up_parser = commands.add_parser("up", help="start everything and keep it running")
    up_parser.add_argument("--home", type=Path, help="folder of all data (default: STROP_HOME, .strop)")
    up_parser.add_argument("--api-port", type=int, default=_API_PORT, help="default %(default)s")
    up_parser.add_argument("--serving-port", type=int, default=_SERVING_PORT, help="default %(default)s")
    up_parser.set_defaults(run=up)
    demo_parser = commands.add_parser("demo", help="train, deploy and ask an adapter, then stop")
    demo_parser.add_argument("--home", type=Path, help="the demo works in HOME/demo (default: STROP_HOME, .strop)")
    demo_parser.set_defaults(run=demo)
    check = commands.add_parser("check-migrations", help="compare the migrations with the tables")
    check.set_defaults(run=check_migrations)
    return parser.parse_args()


def _every_text_model(models: Path) -> str:
    """The bases served when STROP_BASES names none: every model folder there is, those left out that no endpoint serves yet."""

    def is_served(config: Path) -> bool:
        architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or ["unknown"]
        return task_of(architectures[0]) == "causal_lm"

    return ",".join(sorted(config.parent.name for config in models.glob("*/config.json") if is_served(config)))


def _stop(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
