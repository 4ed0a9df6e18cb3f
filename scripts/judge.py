"""From a checkout, what `dpojax judge` does: see dpojax/commands/judge.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("judge")
