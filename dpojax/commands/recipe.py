"""Recipes: dpojax recipe --config=tldr:small --workdir=runs/tldr

Makes one of the experiments of Rafailov et al. 2023 that end in a win rate: trains what the config
file's recipe(config) lists, draws responses, asks the judge, and writes report.md, CSV files and
figures. tldr, hh and instructions have the variants small, for two CPU cores, and
paper. The same command goes on where it was stopped; the plan of all jobs, with the command of
each, is WORKDIR/plan.json.

--dry_run makes nothing: it builds every program from shapes alone, and prints the jobs. Without an
accelerator several jobs may go on at once, in a process each (--workers).
"""

from __future__ import annotations

from typing import NoReturn

from absl import flags

from dpojax import display
from dpojax.config.command_line import ConfigFlag
from dpojax.runs.command import run_script

CONFIG = ConfigFlag("A file with a recipe(config), or FILE:VARIANT.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes.", required=True)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only build every program, and print the jobs.")
WORKERS = flags.DEFINE_integer("workers", 1, "Jobs at once, on a CPU.", lower_bound=1)


def main() -> None:
    from dpojax import storage
    from dpojax.recipes.dry_run import dry_run
    from dpojax.recipes.make import make_recipe
    from dpojax.recipes.recipe import read_recipe
    from dpojax.tables import fitted_markdown, terminal_width

    recipe = read_recipe(CONFIG.path, CONFIG.value)
    if DRY_RUN.value:
        for line in dry_run(CONFIG.value, recipe, WORKDIR.value):
            display.say(line)
        return
    folder = make_recipe(CONFIG.value, recipe, WORKDIR.value, workers=WORKERS.value)
    report = storage.read_text(folder / "report.md").split("\n## Examples")[0]
    print(fitted_markdown(report, terminal_width()))
    display.say(f"{folder}: report.md, its tables as .csv, its figures as .png and .pdf")


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_script(main, CONFIG)
