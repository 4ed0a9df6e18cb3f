"""From a checkout, what `dpojax export` does: see dpojax/commands/export.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("export")
