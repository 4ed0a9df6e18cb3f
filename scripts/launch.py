"""From a checkout, what `dpojax launch` does: see dpojax/commands/launch.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("launch")
