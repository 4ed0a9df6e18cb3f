"""From a checkout, what `dpojax sweep` does: see dpojax/commands/sweep.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("sweep")
