"""`nnsight-vllm serve MODEL [any argument of vllm serve]`: vLLM's own server, with interventions."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from nnsight_vllm import plugins
from nnsight_vllm.errors import EngineSettingError, NNsightError

_PLUGIN = "nnsight_vllm"
_USAGE = "nnsight-vllm serve MODEL [options of `vllm serve`] [options of interventions]"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exits with a line on what's wrong, where something is."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help") or given[0] != "serve":
        if given and given[0] not in ("-h", "--help"):
            print(f"unknown command {given[0]!r}", file=sys.stderr)
        print(f"usage: {_USAGE}\n\n`nnsight-vllm serve --help` tells the options.")
        raise SystemExit(0 if given and given[0] in ("-h", "--help") else 2)
    try:
        serve(given[1:])
    except NNsightError as error:
        print(f"nnsight-vllm: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def serve(arguments: Sequence[str]) -> None:
    """Run the server until it is told to stop. Raises `EngineSettingError` for what can't be served."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise EngineSettingError(
            "serving a model needs vLLM: install nnsight-vllm[cpu] or nnsight-vllm[cuda]"
        ) from error
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    from nnsight_vllm.wire import refusal

    cli_env_setup()
    parser = _parser()
    args = parser.parse_args(list(arguments))
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    with refusal.received() as file:
        prepare(args, {name: parser.get_default(name) for name in vars(args)}, file)
        command.cmd(args)


def prepare(args: Namespace, defaults: dict[str, Any], refusal_file: str | None = None) -> None:
    """Put our worker, scheduler, plugin and limits into vLLM's arguments. Raises `EngineSettingError`."""
    from nnsight_vllm.frontend.settings import check_checkpoint, engine_arguments
    from nnsight_vllm.server.limits import ServerLimits
    from nnsight_vllm.server.tenants import Tenants

    _refuse_ways_of_serving(args)
    check_checkpoint(str(args.model))
    limits = ServerLimits.from_args(args)
    args.intervention_tenants = Tenants.from_args(args)
    args.api_key = args.intervention_tenants.all_keys or None
    given = {name: value for name, value in vars(args).items() if value != defaults.get(name)}
    sites = args.sites if args.sites in ("all", "blocks") else args.sites.split(",")
    ours = engine_arguments(
        {**given, "additional_config": args.additional_config}, sites, refusal_file, limits.of_engine()
    )
    for name in ("worker_cls", "scheduler_cls", "additional_config"):
        setattr(args, name, ours[name])
    if args.host is None and not args.uds:
        args.host = "127.0.0.1"
    args.serves_interventions = True
    plugins.allow(_PLUGIN)


def _parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from nnsight_vllm.server import limits, tenants

    parser = make_arg_parser(FlexibleArgumentParser(prog="nnsight-vllm serve", usage=_USAGE))
    group = parser.add_argument_group("interventions")
    group.add_argument(
        "--sites",
        default="all",
        help="which modules are instrumented: 'all', 'blocks', or patterns of module paths with commas between",
    )
    group.add_argument("--edits-dir", default=None, help="a folder where edited models are kept across restarts")
    tenants.add_arguments(group)
    limits.add_arguments(group)
    parser.set_defaults(shutdown_timeout=30)
    return parser


def _refuse_ways_of_serving(args: Namespace) -> None:
    if (args.api_server_count or 1) > 1:
        raise EngineSettingError(
            f"--api-server-count {args.api_server_count}: tensors, edited models and quotas live in one API server"
        )
    for name in ("headless", "grpc", "data_parallel_multi_port_external_lb"):
        if getattr(args, name, False):
            raise EngineSettingError(f"--{name.replace('_', '-')} can't be served with interventions")
    import vllm.envs as envs

    if envs.VLLM_USE_RUST_FRONTEND:
        raise EngineSettingError("VLLM_USE_RUST_FRONTEND: the front end in Rust knows no plugins")


if __name__ == "__main__":
    main()
