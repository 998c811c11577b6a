"""`hf-momentum doctor`: versions, devices, and what will be refused and why."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from hf_momentum.commands.answers import add_json, answering
from hf_momentum.commands.parsing import add_launcher, command_parser
from hf_momentum.errors import InputError, nearest

HELP = """\
Look at this installation and say what will be refused and why: versions against the supported ones, devices and which
code an optimizer's step runs on them, caches and free disk, whether the Hub answers. With --config also a recipe, its
data and its memory; with --accelerate_config also a launch.

examples:
  hf-momentum doctor
  hf-momentum doctor --config quickstart --accelerate_config ddp
  hf-momentum doctor --json

Every trouble has the next step beside it. Exit status: 0 all well, 1 something will be refused."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    made = command_parser("doctor", HELP, usage="%(prog)s [--config RECIPE] [--accelerate_config NAME] [options]")
    made.add_argument("--config", metavar="RECIPE", help="a YAML file, or a shipped recipe's name; --field value wins")
    add_launcher(made)
    add_json(made)
    return made


def main(words: Sequence[str]) -> int:
    """Run it with the words typed after its name, and return the exit status."""
    made = parser()
    known, overrides = made.parse_known_args(words)
    if overrides and known.config is None:
        hint = nearest(overrides[0].partition("=")[0], ["--config", "--accelerate_config", "--json"])
        raise InputError(f"unknown argument {overrides[0]!r}{hint}; see hf-momentum doctor --help")
    with answering("doctor", known.json) as answer:
        from hf_momentum import launch
        from hf_momentum.commands import checkup
        from hf_momentum.training.quiet import quiet
        from hf_momentum.training.recipe import load_recipe

        with quiet():
            found = [*checkup.versions(), *checkup.devices(), *checkup.caches(), *checkup.hub()]
            optim = None
            if known.config is not None:
                looked = list(checkup.recipe(known.config, overrides))
                found += looked
                if looked[0].state == "ok":
                    training = load_recipe(known.config, overrides).training
                    optim = str(getattr(training.optim, "value", training.optim))
            if known.accelerate_config is not None:
                found += checkup.launch(known.accelerate_config, launch.flags_of(vars(known)), optim)
            else:
                launch.asked_launch(None, launch.flags_of(vars(known)))
        refused = [finding for finding in found if finding.state == "refused"]
        lines: list[str] = []
        for topic in dict.fromkeys(finding.topic for finding in found):
            lines += [f"{topic}:", *(f"  {finding}" for finding in found if finding.topic == topic)]
        verdict = f"{len(refused)} will be refused" if refused else "All well"
        return answer.give([*lines, verdict], int(bool(refused)), ok=not refused, findings=list(map(asdict, found)))
