"""From a checkout, what `dpojax prefer` does: see dpojax/commands/prefer.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("prefer")
