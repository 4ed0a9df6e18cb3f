"""From a checkout, what `dpojax certify` does: see dpojax/commands/certify.py."""

from dpojax.commands.entry import start

if __name__ == "__main__":
    start("certify")
