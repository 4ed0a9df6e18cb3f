"""From a checkout, what `dpojax compare` does: see dpojax/commands/compare.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("compare")
