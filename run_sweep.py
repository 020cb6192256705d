"""Measure which optimizations really help Chatterbox TTS here, and whether they hurt the voice.

    python run_sweep.py +combo=production                  one combo against the baseline, then its report
    python run_sweep.py +sweep=one_at_a_time               each optimization alone
    python run_sweep.py +combo=production +sweep=leave_one_out
    python run_sweep.py -m '+combo=glob(*)'                every combo
    python run_sweep.py +combo=baseline                    identical code against itself: the noise floor

Any setting of configs/ can follow, for example pipeline=chatterbox device=cuda workload=standard
optimizations.vocos.enabled=false. Exit codes: 0 measured, 1 a job failed or is incomplete, 2 bad input.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings

import hydra
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness import preflight
from harness.callback import ReportCallback
from harness.config import checked, explain, plugin_modules, register_catalogue, rest_of
from harness.console import say_error
from harness.errors import UserError
from harness.locations import CONFIGS
from harness.plugins import has_strangers
from harness.worker import start_server

ASKS_ONLY = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}
PLUS = re.compile(r"^\+\+?(?=(combo|sweep)=)")
"""`+combo=production` is read as `combo=production`: both groups have a default, null, and nothing is added to one."""
PERTH_WARNING = "pkg_resources is deprecated"


def main() -> int:
    """The command; returns its exit code."""
    signal.signal(signal.SIGTERM, interrupt)  # a time limit's way of saying Ctrl-C
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what is wrong, and here it becomes one line
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # its workers run in this environment, extras and all
    os.environ.setdefault("PYTHONWARNINGS", f"ignore:{PERTH_WARNING}:UserWarning")  # for the children
    warnings.filterwarnings("ignore", PERTH_WARNING)
    try:
        ReportCallback.exit_code = 0
        sys.argv[1:] = [PLUS.sub("", argument) for argument in sys.argv[1:]]
        try:
            prepare([argument for argument in sys.argv[1:] if not argument.startswith("-")])
            sweep()
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from None
    except UserError as error:
        say_error(str(error))
        return 2
    except KeyboardInterrupt:
        say_error(
            "interrupted: what was measured until then is in the results folder, and `python -m harness report` with "
            "the folder's path tells it"
        )
        return 130
    except SystemExit as end:  # --help and its like, and bad input found inside a job
        return end.code if isinstance(end.code, int) else 0
    return ReportCallback.exit_code


def prepare(overrides: list[str]) -> None:
    """Make known to Hydra what can be configured. Raises UserError for what can be seen to be wrong before composing.

    Other people's plugins import what they need, which takes its time: all the rest of the command is looked at first.
    """
    modules = plugin_modules(overrides)
    elsewhere = any(argument.startswith(("--config-", "-cp", "-cn", "-cd")) for argument in sys.argv[1:])
    if has_strangers(modules) and not elsewhere and not ASKS_ONLY & set(sys.argv[1:]):
        rest = rest_of(overrides)
        register_catalogue(rest)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            preflight.look(checked(compose("config", rest)))
        start_server()  # its imports take as long as those below, and run beside them
    register_catalogue(overrides, modules)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")
def sweep(cfg: DictConfig) -> str | tuple[float, ...] | None:
    """One Hydra job. Its body stays this small because launchers send it to other processes."""
    from harness.sweep import run_jobs

    return run_jobs(cfg)


if __name__ == "__main__":
    sys.exit(main())
